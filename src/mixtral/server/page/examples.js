// Questions to begin with, for the embedded model.

import { button, byId } from "./dom.js";

const EXAMPLES = [
  { lang: "en", text: "When does breakfast start?" },
  { lang: "fr", text: "À quelle heure ferme le Château ?" },
  { lang: "de", text: "Wann öffnet das Uhrenmuseum?" },
  { lang: "es", text: "¿Cuánto cuesta una entrada para el Acuario?" },
  { lang: "it", text: "Qual è la password del wifi?" },
  { lang: "en", text: "How much is a double room at the hotel?" },
];

/** Buttons for the questions; `onChoose` gets the text of the one that was clicked. */
export function showExamples(onChoose) {
  byId("examples").append(...EXAMPLES.map(({ lang, text }) => button(text, () => onChoose(text), { lang })));
}
