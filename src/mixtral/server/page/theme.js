// Sets light or dark before anything is shown. A script of its own, because modules run too late for that.

"use strict";

try {
  const chosen = localStorage.getItem("mixtral.chat.theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // Without storage the system's choice holds; app.js reports it.
}
