// The map: what the server drew, the menus around it, and the document that is looked at.

import { lastHits } from "./ask.js";
import { Canvas } from "./canvas.js";
import { $, el, later, menu } from "./dom.js";
import { get } from "./server.js";
import { headName, language, number, t } from "./words.js";

const SHOWN = 9; // kinds that have a colour of their own
const LENGTH = "";

let about = null;
let drawn = null; // what the server gave
let chosen = { method: "pca" }; // and the model whose index it is, where there are several
let canvas = null;
let spoken = ""; // the language of what is shown
let field = null;
let wanted = "";
let off = new Set();

export function start(facts) {
  about = facts;
  document.addEventListener("asked", () => canvas?.ring(rings()));
}

/** Called when the map comes into sight, and when the language changes. A map that was drawn is found as it was left. */
export async function render() {
  if (about === null) return;
  if (about.index === null) {
    $("map-status").textContent = t("no_index");
    return;
  }
  if (drawn === null) await load(chosen);
  else if (spoken !== language()) show();
  else paint();
}

/** Draws a map; where that fails, the one before stays. */
async function load(asked) {
  $("map-status").textContent = t("map_loading");
  try {
    drawn = await get(`explorer/map?${new URLSearchParams(asked)}`);
  } catch (problem) {
    if (drawn !== null) show();
    $("map-status").textContent = problem.message;
    return;
  }
  chosen = asked;
  off = new Set();
  if (field !== LENGTH && !(field in drawn.fields)) field = null;
  show();
}

function show() {
  spoken = language();
  const names = Object.keys(drawn.fields);
  if (field === null) field = names.find((name) => drawn.fields[name].kind === "kinds") ?? LENGTH;
  const values = { shown: number(drawn.ids.length), total: number(drawn.total), head: headName(drawn.head) };
  const how = drawn.method === "pca" ? t("map_pca", { share: `${number(100 * drawn.variance, 0)} %` }) : t("map_umap");
  $("map-words").textContent = `${t("map_words", values)} ${how}`;
  const menus = [];
  if (about.models.length > 1) {
    const models = about.models.map(({ name }) => [name, name]);
    menus.push(menu(t("model"), models, chosen.model ?? about.index.model, (model) => load({ ...chosen, model })));
  }
  if (drawn.methods.length > 1) {
    const methods = drawn.methods.map((name) => [name, name.toUpperCase()]);
    menus.push(menu(t("drawing"), methods, chosen.method, (method) => load({ ...chosen, method })));
  }
  const choices = [...names.map((name) => [name, name]), [LENGTH, t("characters")]];
  menus.push(menu(t("colour_by"), choices, field, (name) => {
    field = name;
    off = new Set();
    paint();
  }));
  const find = el("input", { type: "search", value: wanted, autocomplete: "off", id: "map-find" });
  find.addEventListener("input", later(() => {
    wanted = find.value;
    search();
  }, 120));
  $("map-options").replaceChildren(...menus, el("label", { class: "field" }, el("span", {}, t("find")), find));
  frame();
  paint();
  search();
}

function frame() {
  const board = el("canvas", { tabindex: "0", role: "application", "aria-label": t("canvas"), "aria-describedby": "map-words" });
  const zoom = (words, sign, work) => el("button", { type: "button", class: "quiet icon", "aria-label": words, title: words, onclick: work }, sign);
  const box = el("div", { class: "board" }, board,
    el("div", { class: "zoom" },
      zoom(t("zoom_in"), "+", () => canvas.zoom(1.5)),
      zoom(t("zoom_out"), "−", () => canvas.zoom(1 / 1.5)),
      zoom(t("zoom_all"), "⤢", () => canvas.all())));
  const panel = el("div", { class: "panel", id: "panel" }, el("p", { class: "soft" }, t("pick")));
  const legend = el("div", { class: "legend", id: "legend" });
  $("atlas").hidden = false;
  $("atlas").replaceChildren(box, panel, legend);
  canvas = new Canvas(board, drawn, look);
  canvas.ring(rings());
}

const rings = () => {
  const place = new Map(drawn?.ids.map((id, number_) => [id, number_]));
  return lastHits().map((hit) => place.get(hit.id) ?? -1);
};

/** The document in view, and its neighbours, as words. */
function look(place, held) {
  const panel = $("panel");
  if (place < 0) {
    panel.replaceChildren(el("p", { class: "soft" }, t("pick")));
    return;
  }
  const facts = Object.keys(drawn.fields).map((name) => [name, drawn.fields[name].values[place]]);
  const near = drawn.neighbours[place].map((other, row) =>
    el("li", {}, el("button", { type: "button", class: "near", onclick: () => canvas.hold(other, true) },
      el("span", { class: "cosine" }, number(drawn.cosines[place][row], 2)),
      el("span", { class: "near-text", dir: "auto" }, drawn.texts[other]))));
  panel.classList.toggle("held", held);
  panel.replaceChildren(
    el("div", { class: "head" }, el("span", { class: "id" }, drawn.ids[place]),
      el("span", { class: "fields" }, facts.filter(([, value]) => value !== null).slice(0, 4).map(([name, value]) =>
        el("span", { class: "chip" }, `${name} ${String(value).slice(0, 40)}`)))),
    el("p", { class: "text open", dir: "auto", "aria-live": "polite" }, drawn.texts[place]),
    el("h2", {}, t("neighbours")),
    el("ol", { class: "nears" }, near));
}

function paint() {
  const chosen = field === LENGTH ? { kind: "numbers", values: drawn.lengths } : drawn.fields[field];
  if (chosen.kind === "numbers") ramp(chosen.values);
  else kinds(chosen.values.map((value) => (value === null ? null : String(value))));
}

function ramp(values) {
  const known = values.filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  canvas.colours(values.map((value) => (value === null ? -1 : high > low ? (value - low) / (high - low) : 0.5)), true);
  const strip = el("span", { class: "strip", "aria-hidden": "true" });
  const digits = Number.isInteger(low) && Number.isInteger(high) ? 0 : 2;
  $("legend").replaceChildren(el("span", {}, number(low, digits)), strip, el("span", {}, number(high, digits)), hint());
}

function kinds(values) {
  const count = new Map();
  for (const value of values) if (value !== null) count.set(value, (count.get(value) ?? 0) + 1);
  const names = [...count.keys()].sort((a, b) => count.get(b) - count.get(a) || (a < b ? -1 : 1)).slice(0, SHOWN);
  const place = new Map(names.map((name, row) => [name, row]));
  const of = values.map((value) => place.get(value) ?? -1);
  canvas.colours(of, false);
  canvas.dim("kinds", off.size ? of.map((kind) => off.has(kind)) : null);
  const rest = values.length - names.reduce((sum, name) => sum + count.get(name), 0);
  const entry = (name, kind, many) =>
    el("button", { type: "button", class: "quiet small kind", "aria-pressed": String(!off.has(kind)), onclick: () => {
      if (off.has(kind)) off.delete(kind);
      else off.add(kind);
      paint();
    } }, el("span", { class: `dot kind-${kind}` }), el("span", { class: "kind-name" }, name), el("span", { class: "soft" }, number(many)));
  const entries = names.map((name, kind) => entry(name, kind, count.get(name)));
  if (rest) entries.push(entry(count.size > SHOWN ? t("others") : t("missing"), -1, rest));
  const focused = [...$("legend").children].indexOf(document.activeElement);
  $("legend").replaceChildren(...entries, hint());
  $("legend").children[focused]?.focus();
}

const hint = () => (lastHits().length ? el("span", { class: "soft" }, t("hit_ring")) : "");

function search() {
  const words = wanted.trim().toLowerCase().split(/\s+/).filter(Boolean);
  const fits = drawn.texts.map((text, place) => {
    const all = `${drawn.ids[place]} ${text}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
  canvas.dim("search", words.length ? fits.map((fit) => !fit) : null);
  $("map-status").textContent = words.length ? t("matches", { count: number(fits.filter(Boolean).length) }) : "";
}
