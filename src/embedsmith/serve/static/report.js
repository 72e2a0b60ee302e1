// A run's report: what training changed, task by task, and the queries that got worse with the reason that the figures
// give.

import { $, el, svg } from "./dom.js";
import { get } from "./server.js";
import { number, signed, t } from "./words.js";

const FIRST = 5;

let about = null;
let run = null;
let ask = () => {};

export function start(facts, asks) {
  about = facts;
  ask = asks;
}

export async function render() {
  if (about === null) return;
  if (!about.run) {
    $("report-status").textContent = t("no_run");
    return;
  }
  if (run === null) {
    $("report-status").textContent = t("report_loading");
    try {
      run = await get("explorer/report");
    } catch (problem) {
      $("report-status").textContent = problem.message;
      return;
    }
  }
  $("report-status").textContent = "";
  $("report-body").replaceChildren(...[lead(), problems(), tasks(), ...run.tasks.map(items), curves(), next()].filter(Boolean));
}

function lead() {
  const key = run.kind === "merge" ? "merge_of" : run.finished ? "run_finished" : "run_going";
  return el("p", { class: "soft" }, t(key, { name: run.name, steps: number(run.step) }));
}

const problems = () => (run.problems.length ? el("p", { class: "note" }, t("problems", { problems: run.problems.join(", ") })) : null);

const hundred = (value, digits = 2) => (value === null ? t("undefined") : number(100 * value, digits));

function tasks() {
  if (!run.tasks.length) return el("p", { class: "note" }, t("no_scores"));
  return el("div", { class: "scores" }, run.tasks.map(score));
}

function score(task) {
  if (task.before === null || task.difference === null)
    return el("article", { class: "score-card" }, el("h2", {}, task.task),
      el("p", { class: "big" }, hundred(task.after ?? task.before)), el("p", { class: "soft" }, `${task.metric} · ${t("one_score")}`));
  const kind = !task.clear ? "chance" : task.difference > 0 ? "better" : "worse";
  const change = el("p", { class: `big ${kind}` }, signed(100 * task.difference));
  const words = [el("span", { class: `badge ${kind}` }, t(task.clear ? (task.difference > 0 ? "better" : "worse") : "chance"))];
  return el("article", { class: "score-card" }, el("h2", {}, task.task), change,
    el("p", { class: "way" }, `${hundred(task.before)} → ${hundred(task.after)} `, el("span", { class: "soft" }, task.metric)),
    interval(task, kind), el("p", {}, words),
    task.items ? el("p", { class: "soft" }, t("better_worse", { better: number(task.better), worse: number(task.worse), items: number(task.items) })) : null);
}

/** The bounds of the change around zero. */
function interval(task, kind) {
  if (task.low === null) return null;
  const most = Math.max(0.001, ...run.tasks.flatMap((each) => [Math.abs(each.low ?? 0), Math.abs(each.high ?? 0)])) * 1.08;
  const x = (value) => 100 + (100 * value) / most;
  const words = `${t("sure")}: ${signed(100 * task.low)} … ${signed(100 * task.high)}`;
  return el("div", { class: "interval" },
    svg("svg", { viewBox: "0 0 200 16", role: "img", "aria-label": words, class: kind, preserveAspectRatio: "none" },
      svg("line", { x1: 100, x2: 100, y1: 0, y2: 16, class: "zero" }),
      svg("line", { x1: x(task.low), x2: x(task.high), y1: 8, y2: 8, class: "span" }),
      svg("line", { x1: x(task.difference), x2: x(task.difference), y1: 3, y2: 13, class: "value" })),
    el("p", { class: "soft small" }, words));
}

function items(task) {
  const fell = task.moved.filter((item) => item.change < 0);
  const rose = task.moved.filter((item) => item.change > 0);
  if (!fell.length && !rose.length) return null;
  return el("section", { class: "block", "aria-label": task.task }, el("h2", {}, task.task),
    el("p", { class: "soft small" }, t(task.kind === "sts" ? "value_sts" : "value", { metric: task.metric })),
    fell.length ? [el("h3", {}, t("which_worse")), list(task, fell)] : null,
    rose.length ? el("details", {}, el("summary", {}, `${t("which_better")} (${number(rose.length)})`), list(task, rose)) : null);
}

function list(task, moved) {
  const box = el("ol", { class: "moved-items" }, moved.slice(0, FIRST).map((item) => entry(task, item)));
  if (moved.length <= FIRST) return box;
  const button = el("button", { type: "button", class: "quiet" }, t("show_more", { count: number(moved.length) }));
  button.addEventListener("click", () => {
    box.append(...moved.slice(FIRST).map((item) => entry(task, item)));
    button.remove();
    box.children[FIRST].querySelector("summary")?.focus();
  });
  return [box, button];
}

function entry(task, item) {
  const kind = item.change < 0 ? "worse" : "better";
  const texts = Object.entries(item.texts).filter(([, text]) => text);
  const query = item.texts.query ?? item.texts.first ?? item.id;
  const askable = item.texts.query && about.index;
  const askIt = () => {
    location.hash = "#ask";
    ask(item.texts.query);
  };
  return el("li", {}, el("details", {},
    el("summary", {}, el("span", { class: "item-text", dir: "auto" }, query),
      el("span", { class: `change ${kind}` }, `${hundred(item.before, 0)} → ${hundred(item.after, 0)}`)),
    why(task, item).map((words) => el("p", { class: "why" }, words)),
    texts.filter(([name]) => name !== "query").map(([name, text]) =>
      el("figure", { class: "quoted" }, el("figcaption", { class: "soft" }, t(`text_${name}`)), el("p", { class: "text open", dir: "auto" }, text))),
    askable ? el("button", { type: "button", class: "quiet", onclick: askIt }, t("ask_this")) : null));
}

/** What the figures of an item say of its change, in sentences. */
function why(task, item) {
  const found = [];
  const plain = (value) => number(value, 3);
  if (item.rank) {
    const [before, after] = item.rank.map((rank) => (rank ? t("rank", { rank }) : t("not_found", { depth: item.depth })));
    if (before !== after) found.push(t("rank_words", { before, after }));
  }
  if (item.right && item.wrong) {
    const leads = [0, 1].map((time) => signed(item.right[time] - item.wrong[time], 3));
    found.push(t("margin_words", { before: leads[0], after: leads[1] }));
    found.push(t("similarities", { right: signed(item.right[1] - item.right[0], 3), wrong: signed(item.wrong[1] - item.wrong[0], 3) }));
  } else if (item.right) found.push(t("right_only", { before: plain(item.right[0]), after: plain(item.right[1]) }));
  if (item.people !== null) {
    const values = { people: number(item.people, 2), before: plain(item.similarity[0]), after: plain(item.similarity[1]) };
    found.push(t(item.change < 0 ? "sts_words" : "sts_better", values));
  }
  if (!found.length) found.push(t("label_words", { before: hundred(item.before), after: hundred(item.after) }));
  return found;
}

function curves() {
  const drawn = run.curves.filter((curve) => curve.series.length);
  if (!drawn.length) return null;
  return el("section", { class: "block" }, el("h2", {}, t("curves")), el("div", { class: "curves" }, drawn.map(curve)));
}

const [WIDE, HIGH, LEFT, FOOT] = [420, 190, 46, 24];

function curve({ name, series }) {
  const points = series.flatMap((each) => each.points);
  const [first, last] = [Math.min(...points.map((p) => p[0])), Math.max(...points.map((p) => p[0]))];
  const [low, high] = [Math.min(...points.map((p) => p[1])), Math.max(...points.map((p) => p[1]))];
  const x = (step) => LEFT + ((step - first) / (last - first || 1)) * (WIDE - LEFT - 8);
  const y = (value) => 8 + (1 - (value - low) / (high - low || 1)) * (HIGH - FOOT - 16);
  const words = (value) => number(value, Math.abs(high - low) < 1 ? 3 : 2);
  const label = (at, up, text, anchor) => {
    const node = svg("text", { x: at, y: up, "text-anchor": anchor });
    node.append(text);
    return node;
  };
  const lines = series.map(({ points: mine }, kind) =>
    mine.length > 1
      ? svg("polyline", { class: `line kind-${kind % 9}`, points: mine.map(([step, value]) => `${x(step)},${y(value)}`).join(" ") })
      : svg("circle", { class: `line kind-${kind % 9}`, cx: x(mine[0][0]), cy: y(mine[0][1]), r: 3 }));
  const grid = [low, high].map((value) => svg("line", { class: "grid", x1: LEFT, x2: WIDE - 8, y1: y(value), y2: y(value) }));
  const title = t(`curve_${name}`);
  const told = series.map((each) => `${each.name}: ${words(each.points[0][1])} → ${words(each.points.at(-1)[1])}`);
  return el("figure", { class: "curve" }, el("figcaption", {}, title),
    svg("svg", { viewBox: `0 0 ${WIDE} ${HIGH}`, role: "img", "aria-label": `${title}. ${told.join("; ")}` }, ...grid, ...lines,
      label(LEFT - 6, y(high) + 4, words(high), "end"), high > low ? label(LEFT - 6, y(low) + 4, words(low), "end") : null,
      label(LEFT, HIGH - 4, number(first), "start"), label(WIDE - 8, HIGH - 4, t("step", { step: number(last) }), "end")),
    el("ul", { class: "series" }, told.map((each, kind) => el("li", {}, el("span", { class: `dot kind-${kind % 9}` }), each))));
}

function next() {
  if (!run.next.length) return null;
  return el("section", { class: "block" }, el("h2", {}, t("next")),
    el("ol", { class: "steps" }, run.next.map((step) =>
      el("li", {}, el("strong", {}, `${step.what}. `), step.why, el("pre", { tabindex: "0" }, el("code", {}, step.command))))));
}
