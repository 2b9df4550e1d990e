// Making elements, speaking to screen readers, copying and saving. Text enters the page as text nodes alone.

/** The element of index.html with this id. */
export const byId = (id) => document.getElementById(id);

/**
 * A new element. `props` are set as properties, except `class`, `aria-*`, `role`, `for` and `data-*`, which are
 * attributes, and `on`, a table of listeners. Children are nodes or text; null and false are left out.
 */
export function element(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === undefined || value === null) continue;
    if (name === "on") for (const [event, listener] of Object.entries(value)) made.addEventListener(event, listener);
    else if (name === "class") made.className = value;
    else if (name === "role" || name === "for" || /^(aria|data)-/.test(name)) made.setAttribute(name, String(value));
    else made[name] = value;
  }
  for (const child of children) if (child !== null && child !== undefined && child !== false) made.append(child);
  return made;
}

/** A button that does something when it is clicked. */
export function button(label, onClick, props = {}) {
  return element("button", { type: "button", ...props, on: { click: onClick } }, label);
}

/** Say something to screen readers, after what was said before. */
export function announce(text) {
  const spoken = text.trim();
  if (spoken === "") return;
  const place = byId("announcer");
  place.append(element("p", {}, spoken));
  while (place.childElementCount > 50) place.firstChild.remove();
}

/** Text to the clipboard. Pages that come over plain HTTP from another machine have only the old way. */
export async function copyText(text) {
  if (navigator.clipboard && window.isSecureContext) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = element("textarea", { value: text, class: "hidden" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error("The browser did not allow copying.");
}

/** A button that copies what `text()` gives, and says so. */
export function copyButton(text, label = "Copy") {
  const made = button(
    label,
    async () => {
      try {
        await copyText(text());
        made.textContent = "Copied";
      } catch {
        made.textContent = "Not allowed";
      }
      announce(made.textContent);
      setTimeout(() => {
        made.textContent = label;
      }, 1500);
    },
    { class: "quiet copy" },
  );
  return made;
}

/** Offer a text as a file. */
export function saveFile(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = element("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** As high as its text. */
export function fitHeight(field) {
  field.style.height = "auto";
  const border = field.offsetHeight - field.clientHeight;
  field.style.height = `${field.scrollHeight + border}px`;
}
