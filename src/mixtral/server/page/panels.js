// The two side panels, which are drawers over the page where it is narrow, and menus that close by themselves.

import { byId } from "./dom.js";

const NARROW = { sidebar: "(max-width: 899px)", settings: "(max-width: 1199px)" };

/** Close open menus. Gives whether there was one; the focus goes back to its button. */
export function closeMenus() {
  let closed = false;
  for (const menu of document.querySelectorAll("details.menu[open]")) {
    closed = true;
    const inside = menu.contains(document.activeElement);
    menu.open = false;
    if (inside) menu.querySelector("summary").focus();
  }
  return closed;
}

/** Conversations on the left and settings on the right. `onSettings` is called when the settings appear. */
export class Panels {
  constructor(onSettings) {
    this.onSettings = onSettings;
    this.narrow = {};
    for (const name of Object.keys(NARROW)) {
      this.narrow[name] = window.matchMedia(NARROW[name]);
      this.narrow[name].addEventListener("change", () => this.#openDrawer(null));
      byId(`${name}-button`).addEventListener("click", () => this.toggle(name));
      byId(`${name}-close`).addEventListener("click", () => this.toggle(name));
    }
    byId("backdrop").addEventListener("click", () => this.closeTop());
    document.addEventListener("click", (event) => {
      if (!event.target.closest("details.menu")) closeMenus();
    });
    this.#refresh();
  }

  isShown(name) {
    if (this.narrow[name].matches) return document.body.dataset.drawer === name;
    const { classList } = document.body;
    return name === "sidebar" ? !classList.contains("no-sidebar") : classList.contains("with-settings");
  }

  show(name) {
    if (!this.isShown(name)) this.toggle(name);
  }

  toggle(name) {
    const shown = !this.isShown(name);
    if (this.narrow[name].matches) this.#openDrawer(shown ? name : null);
    else document.body.classList.toggle(name === "sidebar" ? "no-sidebar" : "with-settings");
    this.#refresh();
    if (name === "settings" && shown) this.onSettings();
    if (shown) byId(`${name}-close`).focus({ preventScroll: true });
    else byId(`${name}-button`).focus();
  }

  /** Close the drawer that covers the page. Gives whether there was one. */
  closeTop() {
    const { drawer } = document.body.dataset;
    if (drawer) this.toggle(drawer);
    return Boolean(drawer);
  }

  /** Close the list of conversations if it covers the page. */
  leaveSidebar() {
    if (document.body.dataset.drawer === "sidebar") this.#openDrawer(null);
  }

  #openDrawer(name) {
    if (name) document.body.dataset.drawer = name;
    else delete document.body.dataset.drawer;
    this.#refresh();
  }

  /** What a drawer covers cannot be reached meanwhile. */
  #refresh() {
    const { drawer } = document.body.dataset;
    byId("center").inert = Boolean(drawer);
    for (const name of Object.keys(NARROW)) {
      byId(name).inert = Boolean(drawer) && drawer !== name;
      byId(`${name}-button`).setAttribute("aria-expanded", String(this.isShown(name)));
    }
  }
}
