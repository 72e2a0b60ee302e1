// Thumbs, by question and document. A training record needs a good answer, so marks wait here until there is one;
// from then on every change goes to the server, which keeps one record a question.

import { toast } from "./dom.js";
import { post } from "./server.js";
import { number, t } from "./words.js";

const all = new Map();
const sent = new Set();
let tell = () => {};
let file = "feedback.jsonl";
let last = Promise.resolve();

export function start(about) {
  file = about.feedback ?? file;
}

export function whenChanged(work) {
  tell = work;
}

export const markOf = (question, id) => all.get(question)?.get(id) ?? 0;

/** Sets a mark; the same one again takes it back. */
export function mark(question, id, vote) {
  const mine = all.get(question) ?? new Map();
  all.set(question, mine);
  const old = mine.get(id) ?? 0;
  mine.set(id, old === vote ? 0 : vote);
  tell();
  last = last.then(() => save(question, mine, id, old));
  return last;
}

async function save(question, mine, id, old) {
  if (![...mine.values()].includes(1) && !sent.has(question)) {
    toast(t("need_good"));
    return;
  }
  try {
    const marks = [...mine].map(([document, vote]) => ({ id: document, vote }));
    const { saved, records } = await post("explorer/feedback", { query: question, marks });
    const words = records === 1 ? t("one_record") : t("some_records", { count: number(records) });
    if (saved) sent.add(question);
    else sent.delete(question);
    toast(t(saved ? "saved" : "withdrawn", { records: words, file }));
  } catch (problem) {
    mine.set(id, old);
    tell();
    toast(problem.message, true);
  }
}
