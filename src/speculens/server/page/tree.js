/* A draft tree as SVG: the root at the left, a column a depth, the accepted path straight along the top,
   every other branch as high as it can stand below what came before it: so no two edges cross. */

const ROW = 30; // pixels from one node to the one below
const HEIGHT = 22;
const GAP = 26; // between columns: room for the edges
const LETTER = 7.9; // width of a monospace letter at 13 px
const LONGEST = 18; // letters of a label; the whole token stands in the node's title

/**
 * Draw `tree`: tokens (strings), parents (index or null or -1 for the root, node 0), accepted (nodes of the path).
 * `own` is the target's token after the path, where it is known: it was wanted there, and not drafted.
 */
export function drawTree(svg, tree, own) {
  const nodes = place(tree, own);
  const width = Math.max(...nodes.map((node) => node.x + node.width)) + 2;
  const height = Math.max(...nodes.map((node) => node.y)) + HEIGHT + 2;
  svg.setAttribute("viewBox", `-1 -1 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  const upwards = nodes.filter((node) => node.parent).sort((first, second) => rank(second) - rank(first));
  svg.replaceChildren(...upwards.map(edge), ...nodes.map(pill)); // what comes later lies on top: the path
}

/** Draw a bar for each of `counts`, side by side; the one `at` is marked. */
export function drawStrip(svg, counts, at) {
  const most = Math.max(...counts);
  const bar = (height, index) => {
    const place = { x: index + 0.1, y: most - height, width: 0.8, height };
    return element("rect", { ...place, class: index === at ? "here" : "bar" });
  };
  svg.setAttribute("viewBox", `0 0 ${counts.length} ${most}`);
  svg.replaceChildren(...counts.map(bar));
}

/** A token as people can see it: spaces and line ends have a sign. */
function label(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}

function place({ tokens, parents, accepted }, own) {
  const kept = new Set([0, ...accepted]);
  const nodes = [];
  const grow = (parent, node) => {
    nodes.push({ ...node, parent, depth: parent ? parent.depth + 1 : 0, children: [] });
    parent?.children.push(nodes.at(-1));
  };
  tokens.forEach((token, index) => grow(index ? nodes[parents[index]] : undefined, { token, kept: kept.has(index) }));
  if (own !== undefined) grow(nodes.findLast((node) => node.kept), { token: own, own: true });
  const columns = [];
  for (const node of nodes) {
    node.text = shortened(label(node.token));
    node.width = Math.ceil([...node.text].length * LETTER) + 16;
    columns[node.depth] = Math.max(columns[node.depth] ?? 0, node.width);
  }
  const lefts = columns.map((_, depth) => columns.slice(0, depth).reduce((sum, width) => sum + width + GAP, 0));
  nodes.forEach((node) => node.children.sort((first, second) => rank(first) - rank(second)));
  const free = columns.map(() => 0); // by depth, the first row with nothing in it or below
  const walk = (node, row) => {
    node.x = lefts[node.depth];
    node.y = row * ROW;
    free[node.depth] = row + 1;
    const below = (child) => Math.max(...chain(child).map((depth) => free[depth]));
    node.children.forEach((child, number) => walk(child, number ? below(child) : row));
  };
  walk(nodes[0], 0);
  return nodes;
}

/** Order among siblings: the accepted path, what the target wanted instead, what the drafter guessed. */
function rank(node) {
  return node.kept ? 0 : node.own ? 1 : 2;
}

/** Depths of a node and of its first children, which stand in one row with it. */
function chain(node) {
  return node ? [node.depth, ...chain(node.children[0])] : [];
}

function shortened(text) {
  const letters = [...text];
  return letters.length > LONGEST ? `${letters.slice(0, LONGEST - 1).join("")}…` : text;
}

function kind({ parent, kept, own }) {
  return !parent ? "root" : own ? "own" : kept ? "kept" : "left";
}

function pill(node) {
  const group = element("g", { class: `node ${kind(node)}`, transform: `translate(${node.x} ${node.y})` });
  const title = element("title");
  title.textContent = JSON.stringify(node.token);
  const text = element("text", { x: 8, y: HEIGHT / 2 + 0.5 });
  text.textContent = node.text;
  group.append(title, element("rect", { width: node.width, height: HEIGHT, rx: 6 }), text);
  return group;
}

function edge(node) {
  const [x0, y0] = [node.parent.x + node.parent.width, node.parent.y + HEIGHT / 2];
  const [x1, y1] = [node.x, node.y + HEIGHT / 2];
  const bend = x1 - GAP / 2; // all edges turn in the gap before the child's column
  const line = `M${x0} ${y0} H${x1 - GAP} C${bend} ${y0} ${bend} ${y1} ${x1} ${y1}`;
  return element("path", { class: kind(node), d: line });
}

function element(name, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
