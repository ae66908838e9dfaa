/* One answer as its chunks come: text, passes, figures. And two of them side by side. */

export class Run {
  text = "";
  tokens = 0;
  accepted = 0;
  seconds = 0;
  passes = []; // {tree, tokens, accepted} of every pass; the prefill's token belongs to none
  figures = {}; // the server's own, with the last chunk
  ending = ""; // "stop", "length", or "stopped" by the reader

  /** Take a chunk in. Returns its runs of text, {text, drafted}. */
  add(chunk) {
    const [choice] = chunk.choices;
    const said = choice?.delta?.content ?? "";
    this.text += said;
    this.ending = choice?.finish_reason ?? this.ending;
    this.figures = chunk.metrics?.speculative_decoding ?? this.figures;
    const step = chunk.speculens ?? { runs: [{ text: said, drafted: false }], tokens: 0, seconds: this.seconds };
    this.tokens += step.tokens;
    this.seconds = step.seconds;
    if (step.tree) {
      this.passes.push(step);
      this.accepted += step.accepted;
    }
    return step.runs;
  }

  get rate() {
    return this.seconds ? this.tokens / this.seconds : 0;
  }

  get count() {
    return this.figures.num_drafts ?? this.passes.length;
  }

  /** Tokens a pass, the target's own bonus token included; NaN before the first pass. */
  get length() {
    const emitted = this.passes.reduce((sum, pass) => sum + pass.tokens, 0);
    return this.figures.mean_acceptance_length ?? emitted / this.passes.length;
  }

  /** The same without the bonus token. */
  get kept() {
    const accepted = this.figures.num_accepted_tokens ?? this.accepted;
    return this.figures.mean_accepted_tokens ?? accepted / this.count;
  }

  /** The target's own token after the path of a pass, where the next pass tells it: its root. */
  own(index) {
    return this.passes[index + 1]?.tree.tokens[0];
  }
}

/** Where two texts part: undefined if nowhere, else what they share at the end of it, and how each goes on. */
export function parting(first, second) {
  if (first === second) return undefined;
  let at = 0;
  while (at < first.length && first[at] === second[at]) at += 1;
  const next = (text) => text.slice(at, at + 30);
  const shared = at > 30 ? `…${first.slice(at - 30, at)}` : first.slice(0, at);
  return { shared, first: next(first), second: next(second) };
}
