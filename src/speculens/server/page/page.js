/* The page: what the reader does goes to the server, what comes back goes onto the screen. Nothing is stored. */

import { chat, model, Refusal } from "./api.js";
import { read, show, thumbnail } from "./pictures.js";
import { parting, Run } from "./run.js";
import { drawStrip, drawTree } from "./tree.js";

const at = (id) => document.getElementById(id);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

let key = ""; // of the server, in memory only
let served = { id: "", speculens: { limits: {} } }; // what the server said of its model
let pictures = []; // of the next question
let messages = []; // of the conversation, as the server wants them
let running; // the AbortController of the request under way
let shown = new Run(); // whose trees the reader walks through

// --- the model, and the key that it may ask for

async function meet() {
  try {
    served = await model(key);
    served.speculens.limits ??= {};
    at("door").hidden = true;
    at("model").textContent = describe(served);
    at("compare").closest("label").hidden = !served.speculens.baseline || served.speculens.drafter === "none";
    document.title = `${served.id} · speculens`;
    return true;
  } catch (error) {
    at("model").textContent = "";
    refused(error);
    return false;
  }
}

function describe({ id, speculens: { family, drafter, tree, sized, max_model_len: length } }) {
  const nodes = tree?.num_draft_tokens;
  return [
    id,
    family,
    drafter && `drafter ${drafter}`,
    nodes && (sized ? `trees of up to ${nodes} nodes` : `tree of ${nodes} nodes`),
    length && `${length.toLocaleString("en")} tokens of context`,
  ].filter(Boolean).join(" · ");
}

function refused(error) {
  const asksForKey = error.status === 401;
  tell(asksForKey && !key ? "" : error.message);
  if (!asksForKey) return;
  at("door").hidden = false;
  at("key").focus();
}

function tell(sentence) {
  at("error").textContent = sentence;
}

at("door").addEventListener("submit", async (event) => {
  event.preventDefault();
  key = at("key").value;
  at("key").value = "";
  tell("");
  if (!await meet()) return;
  if (at("question").value.trim()) ask();
  else at("question").focus();
});

// --- pictures

async function add(files) {
  tell("");
  const notes = [];
  for (const file of files) {
    const { limits } = served.speculens;
    try {
      if (at("talk").querySelectorAll("img").length >= limits.images) {
        throw new Error(`This server takes at most ${limits.images} pictures in a conversation.`);
      }
      const picture = await read(file, limits);
      pictures.push(picture);
      notes.push(picture.note);
      refreshPictures();
    } catch (error) {
      tell(error.message);
    }
  }
  at("note").textContent = notes.filter(Boolean).join(" ");
}

function refreshPictures() {
  show(at("pictures"), pictures, (index) => {
    pictures.splice(index, 1);
    at("note").textContent = "";
    refreshPictures();
    (at("pictures").querySelectorAll("button")[index] ?? at("choose")).focus();
  });
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");

at("choose").addEventListener("change", () => add([...at("choose").files]).then(() => { at("choose").value = ""; }));
addEventListener("paste", (event) => {
  if (!event.clipboardData?.files.length) return;
  event.preventDefault();
  add([...event.clipboardData.files]);
});
addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = false;
});
addEventListener("dragleave", (event) => { at("drop").hidden ||= event.relatedTarget === null; });
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  at("drop").hidden = true;
  add([...event.dataTransfer.files]);
});

// --- a question and its answer

async function ask() {
  const question = at("question").value.trim();
  if (running) return;
  if (!question) return tell("Type a question first.");
  const options = settings();
  if (!options || !(served.id || await meet()) || running) return;
  const sent = { question, pictures };
  const body = { ...options, messages: [...messages, { role: "user", content: content(sent) }] };
  const before = shown;
  const run = begin();
  const turn = addTurn(sent);
  try {
    await follow(run, body, (runs) => {
      write(turn, run, runs);
      refresh();
    });
    closing(turn, run);
    if (at("compare").checked && !at("compare").closest("label").hidden) await compare(run, body);
  } catch (error) {
    if (!running.signal.aborted) refused(error);
    run.ending ||= running.signal.aborted ? "stopped" : "broken off";
    closing(turn, run);
  }
  if (run.text) messages = [...body.messages, { role: "assistant", content: run.text }];
  else takeBack(turn, sent, before);
  end();
}

/** Ask, and take what comes into `run`; `onRuns` is told of each chunk's runs of text. */
async function follow(run, body, onRuns, baseline = false) {
  const request = { model: served.id, ...body, speculens: { steps: true, baseline } };
  for await (const chunk of chat(request, key, running.signal)) onRuns(run.add(chunk));
}

async function compare(run, body) {
  const own = new Run();
  at("without").hidden = false;
  at("verdict").textContent = "The same question again, without drafter …";
  try {
    await follow(own, body, () => row("without", own), true);
  } catch (error) {
    at("verdict").textContent = "The run without drafter did not end: nothing to compare.";
    throw error;
  }
  row("without", own);
  const times = document.createElement("strong");
  times.textContent = `${(run.rate / own.rate).toFixed(2)}×`;
  const told = sameness(parting(run.text, own.text));
  at("verdict").replaceChildren(times, ` the speed, end to end, in one run of each. ${told}`);
}

function sameness(part) {
  if (!part) return "The two texts are equal, letter for letter.";
  const goes = (text) => (text ? `“${text}”` : "nothing more");
  return `The texts part after “${part.shared}”: with drafter ${goes(part.first)}, without ${goes(part.second)}. `
    + "In low precision two tokens can be closer than the rounding.";
}

function content({ question, pictures: sent }) {
  if (!sent.length) return question;
  return [...sent.map(({ uri }) => ({ type: "image_url", image_url: { url: uri } })), { type: "text", text: question }];
}

/** The settings as the request names them; undefined, and the reader is led there, if one is out of range. */
function settings() {
  const wrong = at("settings").querySelector(":invalid");
  if (wrong) {
    wrong.closest("details").open = true;
    wrong.focus();
    tell(`${wrong.closest("label").firstChild.textContent.trim()}: ${wrong.validationMessage}`);
    return undefined;
  }
  const names = { temperature: "temperature", top_p: "top-p", seed: "seed", max_tokens: "max-tokens" };
  const given = Object.entries(names).filter(([, id]) => at(id).value !== "");
  return Object.fromEntries(given.map(([name, id]) => [name, at(id).valueAsNumber]));
}

/** A new run, on a screen that shows nothing of the last one. */
function begin() {
  point(-1);
  running = new AbortController();
  shown = new Run();
  pictures = [];
  refreshPictures();
  at("question").value = "";
  for (const id of ["error", "note", "verdict", "spoken"]) at(id).textContent = "";
  at("lead").hidden = true;
  at("insight").hidden = false;
  at("without").hidden = true;
  turnButtons();
  return shown;
}

function end() {
  running = undefined;
  turnButtons();
}

function turnButtons() {
  const focused = [at("send"), at("stop")].includes(document.activeElement);
  at("send").hidden = Boolean(running);
  at("stop").hidden = !running;
  at("clear").hidden = Boolean(running) || !at("turns").children.length;
  if (focused) at(running ? "stop" : "send").focus();
}

/** Nothing was said: the question goes back to where it can be asked again, unless the next one stands there. */
function takeBack(turn, sent, before) {
  turn.remove();
  at("question").value ||= sent.question;
  pictures = [...sent.pictures, ...pictures];
  refreshPictures();
  shown = before;
  draw();
  at("insight").hidden = !shown.tokens;
  at("lead").hidden = at("turns").children.length > 0;
}

at("composer").noValidate = true;
at("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
at("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
at("stop").addEventListener("click", () => running?.abort());
at("clear").addEventListener("click", () => {
  messages = [];
  shown = new Run();
  at("turns").replaceChildren();
  at("insight").hidden = true;
  at("lead").hidden = false;
  tell("");
  turnButtons();
  at("question").focus();
});

// --- on the screen: the conversation

function addTurn({ question, pictures: sent }) {
  const turn = document.createElement("li");
  const images = part("div", "pictures");
  images.append(...sent.map(({ name, uri }) => thumbnail(name, uri)));
  turn.append(part("h3", "hidden", "Question"), ...(sent.length ? [images] : []), part("p", "question", question));
  turn.append(part("h3", "hidden", "Answer"), part("p", "answer running"), part("p", "closing about"));
  at("turns").append(turn);
  return turn;
}

function part(name, classes, text = "") {
  const made = document.createElement(name);
  made.className = classes;
  made.textContent = text;
  return made;
}

/** Append the text of one chunk. A run is marked as long as it was: tokens that one pass accepted. */
function write(turn, run, runs) {
  const following = at("composer").getBoundingClientRect().bottom <= innerHeight + 4;
  const answer = turn.querySelector(".answer");
  const whole = part("span", "");
  whole.dataset.pass = run.passes.length;
  const size = 1 + [2, 4, 6].filter((least) => run.passes.at(-1)?.accepted >= least).length;
  for (const { text, drafted } of runs.filter(({ text: said }) => said)) {
    const [space] = text.match(/^\s*(?=\S)/) ?? [""]; // before mark and outline: a line may end between
    const span = part("span", drafted ? "kept" : "", text.slice(space.length));
    if (drafted) span.dataset.size = size;
    const begun = answer.textContent || whole.textContent; // some models begin with a space: it would look like a slip
    if (begun) (whole.firstChild ? whole : answer).append(space);
    whole.append(span);
    speak(text);
  }
  answer.append(whole);
  if (following) at("composer").scrollIntoView({ block: "nearest" });
}

/** The answer has ended, one way or another. */
function closing(turn, run) {
  turn.querySelector(".answer").classList.remove("running");
  turn.querySelector(".closing").textContent = [
    `${run.tokens} tokens in ${run.count} passes`,
    `${run.rate.toFixed(1)} tokens/s`,
    run.count ? `acceptance length ${run.length.toFixed(2)} (${run.kept.toFixed(2)} without the bonus token)` : "",
    { stop: "", length: "cut at the most tokens" }[run.ending] ?? run.ending,
  ].filter(Boolean).join(" · ");
  speak("", true);
  draw();
}

let unspoken = "";

/** To screen readers by sentences, not by pieces of words; the visible text itself is no live region. */
function speak(text, last = false) {
  unspoken += text;
  const [whole] = last ? [unspoken] : unspoken.match(/^[^]*[.!?:;,](?=\s)/) ?? [""];
  if (whole.length < 60 && !last) return;
  at("spoken").append(part("p", "", whole));
  unspoken = unspoken.slice(whole.length);
}

// --- on the screen: how it was decoded

let drawing = 0;

/** Draw soon: passes can come faster than anyone sees, and those who want calm get a picture a second. */
function refresh() {
  drawing ||= setTimeout(draw, calm.matches ? 1000 : 80);
}

function draw() {
  clearTimeout(drawing);
  drawing = 0;
  const { passes } = shown;
  row("with", shown);
  at("length").textContent = shown.count ? shown.length.toFixed(2) : "–";
  at("accepted").textContent = shown.count ? shown.kept.toFixed(2) : "–";
  at("walk").hidden = !passes.length;
  at("step").max = Math.max(1, passes.length);
  at("step").value = passes.length;
  at("step").disabled = !shown.ending; // while passes come, it follows
  drawPass(passes.length - 1);
}

function row(id, run) {
  const cells = [run.rate.toFixed(1), run.tokens, run.count, `${run.seconds.toFixed(2)} s`];
  at(id).querySelectorAll("td").forEach((cell, number) => { cell.textContent = cells[number]; });
}

function drawPass(index) {
  const pass = shown.passes[index];
  if (!pass) return at("tree").replaceChildren();
  const { tree, accepted } = pass;
  const own = shown.own(index);
  drawTree(at("tree"), tree, own);
  drawStrip(at("strip"), shown.passes.map(({ tokens }) => tokens), index);
  const kept = tree.accepted.filter((node) => node > 0).map((node) => tree.tokens[node]).join("");
  const quoted = (text) => `“${text.replaceAll("\n", "⏎").trim() || "␣"}”`;
  const said = `Step ${index + 1} of ${shown.passes.length}: ${tree.tokens.length - 1} drafted, ${accepted} accepted`
    + (kept && ` ${quoted(kept)}`) + (own === undefined ? "." : `, then the model’s own ${quoted(own)}.`);
  at("caption").textContent = said;
  at("tree").setAttribute("aria-label", `Draft tree. ${said}`);
  at("step").setAttribute("aria-valuetext", said);
}

/** Outline the words of a pass, from 1, in the newest answer. */
function point(number) {
  for (const whole of at("turns").lastElementChild?.querySelectorAll("[data-pass]") ?? []) {
    whole.classList.toggle("here", whole.dataset.pass === String(number));
  }
}

at("step").addEventListener("input", () => {
  drawPass(at("step").valueAsNumber - 1);
  point(at("step").valueAsNumber);
});
at("fit").addEventListener("change", () => at("tree").classList.toggle("fit", at("fit").checked));

meet();
