"use strict";
// The explorer: choose kind, layer and head; read a cell. Arrays are gzipped bytes in base64, unpacked when first shown.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { kind: 0, layer: 0, head: 0, map: "mean", mask: -1, shown: 0, cell: null, pinned: false };
const unpacked = new Map();

function bytes(id) {
  if (!unpacked.has(id)) {
    const binary = atob($(id).textContent);
    const packed = new Uint8Array(binary.length);
    for (let k = 0; k < binary.length; k++) packed[k] = binary.charCodeAt(k);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(id, new Response(stream).arrayBuffer());
  }
  return unpacked.get(id);
}

// Mean attention of a code: 0 for 0, else equal ratios from low to high.
const valueOf = (code) => (code === 0 ? 0 : data.low * (data.high / data.low) ** ((code - 1) / 254));
const kind = () => data.kinds[state.kind];

// Everything that one head's picture needs: codes of the mean attention, kept shares (or null), support.
async function headData(k, layer, head, mask) {
  const size = k.rows * k.columns;
  const [mean, support, kept] = await Promise.all([
    bytes(`mean-${k.name}-${layer}`),
    bytes(`support-${k.name}`),
    mask < 0 ? null : bytes(`kept-${mask}-${k.name}-${layer}`),
  ]);
  return {
    mean: new Uint8Array(mean, head * size, size),
    support: new Float32Array(support),
    kept: kept && new Uint8Array(kept, head * size, size),
  };
}

// -- colours ---------------------------------------------------------------------------------------------------------

// Light ground: dark cells hold much attention; dark ground: light ones. Pruned cells take the grey of their value.
function colour(share, pruned) {
  const step = Math.round(255 * Math.min(1, Math.max(0, share)));
  if (pruned) {
    const grey = Math.round(dark.matches ? 45 + 0.25 * step : 237 - 0.38 * step);
    return [grey, grey, grey];
  }
  const at = 3 * (dark.matches ? step : 255 - step);
  return data.colours.slice(at, at + 3);
}

// Where a code of the map in view lies on its colour scale, in [0, 1].
function shareOf(code) {
  if (state.map === "support") return code / 255;
  return Math.log(Math.max(valueOf(code), data.palest) / data.palest) / Math.log(data.high / data.palest);
}

// Four bytes of each code in turn: 256 of kept cells, then 256 of pruned ones.
function palette() {
  const table = new Uint8ClampedArray(4 * 512);
  for (let k = 0; k < 512; k++) table.set([...colour(shareOf(k % 256), k > 255), 255], 4 * k);
  return new Uint32Array(table.buffer);
}

// Support as codes of a logarithmic scale from one sentence to the most.
const supportCodes = new Map();
function codesOf(head, k) {
  if (state.map === "mean") return head.mean;
  if (!supportCodes.has(k)) {
    const most = Math.log(Math.max(2, k.most));
    supportCodes.set(k, Uint8Array.from(head.support, (n) => Math.round((255 * Math.log(Math.max(1, n))) / most)));
  }
  return supportCodes.get(k);
}

function paint(canvas, head, k, rows, columns, colours) {
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  const pixels = new Uint32Array(image.data.buffer);
  const codes = codesOf(head, k);
  for (let i = 0; i < rows; i++) {
    for (let j = 0; j < columns; j++) {
      const index = i * k.columns + j;
      if (!(head.support[index] > 0)) continue; // stays transparent
      const pruned = head.kept !== null && head.kept[index] < 128;
      pixels[i * columns + j] = colours[codes[index] + (pruned ? 256 : 0)];
    }
  }
  context.putImageData(image, 0, 0);
}

// -- values ----------------------------------------------------------------------------------------------------------

function meanText(code) {
  return (code === 1 ? "at most " : "") + (code === 0 ? "0" : valueOf(code).toPrecision(2));
}

function positionText(index, factor, length) {
  const last = Math.min(length, (index + 1) * factor) - 1;
  return factor === 1 ? `${index}` : `${index * factor}–${last}`;
}

function describe(head, k, i, j) {
  const index = i * k.columns + j;
  const where = `query ${positionText(i, k.factor, k.queries)}, key ${positionText(j, k.factor, k.keys)}`;
  if (!(head.support[index] > 0)) {
    return `${where}: ${k.causal && j > i ? "does not exist, the key is a later token" : "not recorded in any sentence"}`;
  }
  const n = head.support[index];
  const sentences = k.factor === 1 ? n.toLocaleString("en") : `${n.toPrecision(3)} (mean of the bin)`;
  let text = `${where}: mean attention ${meanText(head.mean[index])}, in ${sentences} sentence${n === 1 ? "" : "s"}`;
  if (head.kept) {
    const share = head.kept[index] / 255;
    const name = data.masks[state.mask];
    if (share === 0 || share === 1) text += `, ${share ? "kept" : "pruned"} by ${name}`;
    else text += `, ${(100 * share).toFixed(0)}% of its pairs kept by ${name}`;
  }
  return text;
}

// -- drawing ---------------------------------------------------------------------------------------------------------

const extent = (k) => [Math.min(k.rows, Math.ceil(state.shown / k.factor)), Math.min(k.columns, Math.ceil(state.shown / k.factor))];
const MARGIN = { left: 40, top: 8, right: 12, bottom: 36 };
let current = null; // the data of the head in the viewer

function geometry() {
  const canvas = $("cells");
  const [rows, columns] = extent(kind());
  const width = canvas.clientWidth - MARGIN.left - MARGIN.right;
  const height = Math.min(width * 1.5, Math.max(width * 0.3, (width * rows) / columns));
  return { rows, columns, width, height };
}

function drawViewer() {
  if (!current) return;
  const k = kind();
  const canvas = $("cells");
  const { rows, columns, width, height } = geometry();
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(canvas.clientWidth * ratio);
  canvas.height = Math.round((height + MARGIN.top + MARGIN.bottom) * ratio);
  canvas.style.height = `${height + MARGIN.top + MARGIN.bottom}px`;
  const context = canvas.getContext("2d");
  const style = getComputedStyle(document.documentElement);
  context.scale(ratio, ratio);
  context.fillStyle = style.getPropertyValue("--unseen");
  context.fillRect(MARGIN.left, MARGIN.top, width, height);
  const picture = document.createElement("canvas");
  paint(picture, current, k, rows, columns, palette());
  context.imageSmoothingEnabled = false;
  context.drawImage(picture, MARGIN.left, MARGIN.top, width, height);
  context.strokeStyle = style.getPropertyValue("--line");
  context.strokeRect(MARGIN.left + 0.5, MARGIN.top + 0.5, width - 1, height - 1);
  context.fillStyle = style.getPropertyValue("--text");
  context.font = '12px system-ui, "DejaVu Sans", sans-serif';
  const room = Math.max(rows, columns) * k.factor;
  const step = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000].find((size) => room / size <= 8) || 2000;
  context.textAlign = "center";
  for (let p = 0; p < columns * k.factor; p += step) {
    context.fillText(p, MARGIN.left + ((p / k.factor + 0.5) * width) / columns, MARGIN.top + height + 14);
  }
  context.fillText("key position", MARGIN.left + width / 2, MARGIN.top + height + 30);
  context.textAlign = "right";
  for (let p = 0; p < rows * k.factor; p += step) {
    context.fillText(p, MARGIN.left - 5, MARGIN.top + ((p / k.factor + 0.5) * height) / rows + 4);
  }
  context.save();
  context.translate(11, MARGIN.top + height / 2);
  context.rotate(-Math.PI / 2);
  context.textAlign = "center";
  context.fillText("query position", 0, 0);
  context.restore();
  if (state.cell) {
    const [i, j] = state.cell;
    const box = [MARGIN.left + (j * width) / columns, MARGIN.top + (i * height) / rows, width / columns, height / rows];
    context.lineWidth = 4;
    context.strokeStyle = "#000000";
    context.strokeRect(...box);
    context.lineWidth = 2;
    context.strokeStyle = "#ffffff";
    context.strokeRect(...box);
  }
}

function readout() {
  const k = kind();
  const name = `${k.name}, layer ${state.layer}, head ${state.head} (${k.patterns[state.layer][state.head]})`;
  $("cells").setAttribute("aria-label", `Heat map of ${name}. Arrow keys move from cell to cell.`);
  $("readout").textContent = state.cell ? `${name}; ${describe(current, k, ...state.cell)}` : name;
}

function legend() {
  const bar = $("legend-bar").getContext("2d");
  for (let x = 0; x < 256; x++) {
    bar.fillStyle = `rgb(${colour(x / 255, false)})`;
    bar.fillRect(x, 0, 1, 12);
  }
  const mean = state.map === "mean";
  $("legend-low").textContent = mean ? data.palest.toPrecision(2) : "1";
  $("legend-high").textContent = mean ? data.high.toPrecision(2) : Math.round(kind().most).toLocaleString("en");
}

async function thumbnail(button, k, layer, head, mask, colours) {
  const content = await headData(k, layer, head, mask);
  if (k === kind()) paint(button.firstChild, content, k, ...extent(k), colours);
}

// Draws everything anew: after any choice but that of a cell.
let generation = 0;
async function render() {
  const mine = ++generation;
  const k = kind();
  const { layer, head, mask } = state;
  const content = await headData(k, layer, head, mask);
  if (mine !== generation) return; // a later choice has overtaken this one
  current = content;
  const [rows, columns] = extent(k);
  if (state.cell) state.cell = [Math.min(state.cell[0], rows - 1), Math.min(state.cell[1], columns - 1)];
  $("positions-text").textContent = `${state.shown} of ${Math.max(k.queries, k.keys)}`;
  legend();
  drawViewer();
  readout();
  const buttons = [...$("grid").children];
  for (const button of buttons) {
    const chosen = +button.dataset.layer === layer && +button.dataset.head === head;
    button.setAttribute("aria-pressed", chosen);
  }
  const colours = palette();
  await Promise.all(
    buttons.map((button) => thumbnail(button, k, +button.dataset.layer, +button.dataset.head, mask, colours)),
  );
  document.body.dataset.ready = mine;
}

// -- choices ---------------------------------------------------------------------------------------------------------

function chooseKind(index) {
  const k = data.kinds[index];
  Object.assign(state, { kind: index, shown: k.busy, cell: null, pinned: false });
  state.layer = Math.min(state.layer, k.layers - 1);
  state.head = Math.min(state.head, k.heads - 1);
  $("positions").max = Math.max(k.queries, k.keys);
  $("positions").value = k.busy;
  const grid = $("grid");
  grid.style.gridTemplateColumns = `repeat(${k.heads}, minmax(2.5rem, 10rem))`;
  grid.replaceChildren();
  for (let layer = 0; layer < k.layers; layer++) {
    for (let head = 0; head < k.heads; head++) {
      const button = document.createElement("button");
      button.type = "button";
      Object.assign(button.dataset, { layer, head });
      const pattern = k.patterns[layer][head];
      button.setAttribute("aria-label", `layer ${layer}, head ${head}, pattern ${pattern}`);
      button.title = `layer ${layer}, head ${head}: ${pattern}`;
      button.append(document.createElement("canvas"), `${layer}.${head}`);
      button.addEventListener("click", () => {
        Object.assign(state, { layer, head });
        render();
      });
      grid.append(button);
    }
  }
  render();
}

function cellAt(event) {
  const { rows, columns, width, height } = geometry();
  const j = Math.floor(((event.offsetX - MARGIN.left) / width) * columns);
  const i = Math.floor(((event.offsetY - MARGIN.top) / height) * rows);
  return i >= 0 && i < rows && j >= 0 && j < columns ? [i, j] : null;
}

function moveTo(cell) {
  state.cell = cell;
  drawViewer();
  readout();
}

const cells = $("cells");
cells.addEventListener("pointermove", (event) => {
  if (!state.pinned && current) moveTo(cellAt(event));
});
cells.addEventListener("pointerleave", () => {
  if (!state.pinned && current) moveTo(null);
});
cells.addEventListener("click", (event) => {
  const cell = cellAt(event);
  const again = state.pinned && cell && state.cell && cell.join() === state.cell.join();
  state.pinned = cell !== null && !again;
  moveTo(cell);
});
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
cells.addEventListener("keydown", (event) => {
  const move = ARROWS[event.key];
  if (event.key === "Escape") {
    state.pinned = false;
    moveTo(null);
  } else if (move) {
    event.preventDefault(); // the page would scroll
    const [rows, columns] = extent(kind());
    const [i, j] = state.cell || [-move[0], -move[1]].map((d) => Math.min(d, 0));
    state.pinned = true;
    moveTo([Math.min(rows - 1, Math.max(0, i + move[0])), Math.min(columns - 1, Math.max(0, j + move[1]))]);
  }
});

data.kinds.forEach((k, index) => {
  const label = document.createElement("label");
  const input = Object.assign(document.createElement("input"), { type: "radio", name: "kind", value: k.name, checked: !index });
  input.addEventListener("change", () => chooseKind(index));
  label.append(input, k.name);
  $("kinds").append(label);
});
data.masks.forEach((name, index) => $("mask").append(new Option(name, index)));
state.mask = data.masks.length ? 0 : -1;
$("mask").value = state.mask;
for (const [id, read] of [["map", String], ["mask", Number]]) {
  $(id).addEventListener("change", () => {
    state[id] = read($(id).value);
    render();
  });
}
$("positions").addEventListener("input", () => {
  state.shown = Number($("positions").value);
  render();
});
dark.addEventListener("change", render);
addEventListener("resize", drawViewer);
chooseKind(0);
