// The frame of the page: its three parts, language, colours and the key.

import * as asking from "./ask.js";
import { $, toast } from "./dom.js";
import * as map from "./map.js";
import * as marks from "./marks.js";
import * as report from "./report.js";
import { get, keepKey, whenKeyIsMissing } from "./server.js";
import { language, t, translate } from "./words.js";

const VIEWS = { ask: asking, map, report };
const THEMES = ["auto", "light", "dark"];

function keep(name, value) {
  try {
    const kept = JSON.parse(localStorage.getItem("embedsmith")) || {};
    localStorage.setItem("embedsmith", JSON.stringify({ ...kept, [name]: value }));
  } catch {
    // no storage: it holds until the page is left
  }
}

const view = () => (location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "ask");

function turn() {
  for (const name of Object.keys(VIEWS)) $(name).hidden = name !== view();
  for (const link of document.querySelectorAll("nav a"))
    if (link.dataset.view === view()) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  VIEWS[view()].render();
}

function dress() {
  translate();
  document.title = `embedsmith · ${t(view())}`;
  $("language").textContent = t("other_language");
  $("language").lang = language() === "zh" ? "en" : "zh-CN";
  const words = t(`theme_${document.documentElement.dataset.theme}`);
  $("theme").title = words;
  $("theme").setAttribute("aria-label", `${t("theme")}: ${words}`);
}

$("language").addEventListener("click", () => {
  const next = language() === "zh" ? "en" : "zh";
  document.documentElement.lang = next === "zh" ? "zh-CN" : "en";
  keep("language", next);
  dress();
  VIEWS[view()].render();
});

$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  root.dataset.theme = THEMES[(THEMES.indexOf(root.dataset.theme) + 1) % THEMES.length];
  keep("theme", root.dataset.theme);
  dress();
  toast(t(`theme_${root.dataset.theme}`));
  document.dispatchEvent(new Event("theme"));
});

/** Shows the key's form; several calls that wait for a key share one. */
let waiting = null;

function askForKey() {
  waiting ??= new Promise((done) => {
    const dialog = $("key-dialog");
    $("key-button").hidden = false;
    dialog.returnValue = "";
    dialog.showModal();
    dialog.addEventListener("close", () => {
      waiting = null;
      const given = $("key-input").value;
      $("key-input").value = "";
      if (dialog.returnValue === "given" && given) keepKey(given);
      done(dialog.returnValue === "given" && Boolean(given));
    }, { once: true });
  });
  return waiting;
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  $("key-dialog").close("given");
});
$("key-cancel").addEventListener("click", () => $("key-dialog").close(""));
$("key-button").addEventListener("click", async () => {
  if (await askForKey()) begin();
});
whenKeyIsMissing(askForKey);

addEventListener("hashchange", () => {
  dress();
  turn();
  $("main").focus({ preventScroll: true });
});

let begun = false;

async function begin() {
  try {
    const about = await get("explorer/about");
    if (!begun) for (const part of [marks, asking, map]) part.start(about);
    if (!begun) report.start(about, asking.ask);
    if (!begun && view() === "ask" && matchMedia("(hover: hover)").matches) $("question").focus();
    begun = true;
  } catch (problem) {
    $("ask-status").textContent = problem.message;
  }
  turn();
}

dress();
begin();
