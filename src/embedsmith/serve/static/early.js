// Before anything is drawn: the colours and the language that were chosen here before, else those of the browser.
"use strict";
{
  let kept = {};
  try {
    kept = JSON.parse(localStorage.getItem("embedsmith")) || {};
  } catch {
    // no storage: the browser's own settings count
  }
  const root = document.documentElement;
  root.dataset.theme = ["light", "dark"].includes(kept.theme) ? kept.theme : "auto";
  const first = (navigator.languages && navigator.languages[0]) || navigator.language || "en";
  const language = ["en", "zh"].includes(kept.language) ? kept.language : first.startsWith("zh") ? "zh" : "en";
  root.lang = language === "zh" ? "zh-CN" : "en";
}
