// The list of conversations.

import { byId, element } from "./dom.js";

/** Today, yesterday, or the day. */
function dayOf(time) {
  const day = new Date(time);
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - new Date(time).setHours(0, 0, 0, 0)) / 86_400_000);
  if (days <= 0) return "Today";
  if (days === 1) return "Yesterday";
  return day.toLocaleDateString(undefined, { day: "numeric", month: "long", year: "numeric" });
}

/** Show conversations, the latest first, under their days. `onChoose` gets the one that was clicked. */
export function showConversations(conversations, current, onChoose) {
  const focused = document.activeElement?.dataset?.conversation;
  const parts = [];
  let day = null;
  for (const conversation of conversations) {
    const its = dayOf(conversation.updated);
    if (its !== day) {
      day = its;
      parts.push(element("li", { class: "day" }, day));
    }
    const item = element(
      "button",
      {
        type: "button",
        title: conversation.title,
        "data-conversation": conversation.id,
        "aria-current": conversation.id === current.id ? "true" : null,
        on: { click: () => onChoose(conversation) },
      },
      conversation.title,
    );
    parts.push(element("li", {}, item));
  }
  const list = byId("conversations");
  list.replaceChildren(...parts);
  if (focused) list.querySelector(`[data-conversation="${CSS.escape(focused)}"]`)?.focus();
}
