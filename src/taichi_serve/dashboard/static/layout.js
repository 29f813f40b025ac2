// Where everything stands on the board: P-heavy instances above, D-heavy ones below, and room between for moves.

const GAP = 12;
const PAD = 10;
const PITCHES = [11, 9, 7.5, 6, 5, 4, 3.2];

export const BANDS = ["P-heavy", "D-heavy"];

function box(instance, x, y, w, h) {
  const inner = { x: x + PAD, w: w - 2 * PAD };
  return {
    ...{ name: instance.name, kind: instance.kind, x, y, w, h },
    middle: { x: x + w / 2, y: y + h / 2 },
    queue: { ...inner, y: y + 46, h: 22 },
    running: { ...inner, y: y + 74, h: h - 74 - 24 },
  };
}

// The boxes of all instances by name, the pool of those that wait for an instance, and the height of it all.
export function lay(instances, width) {
  const narrow = width < 560;
  const [least, height, between] = narrow ? [104, 128, 56] : width < 900 ? [150, 162, 72] : [150, 188, 92];
  const bands = BANDS.map((kind) => instances.filter((one) => one.kind === kind)).filter((band) => band.length);
  const boxes = new Map();
  let y = 40;
  for (const band of bands) {
    const across = Math.max(1, Math.min(band.length, Math.floor((width + GAP) / (least + GAP))));
    const w = Math.min(400, (width - GAP * (across - 1)) / across);
    const left = (width - across * w - GAP * (across - 1)) / 2;
    band.forEach((one, number) => {
      const [column, row] = [number % across, Math.floor(number / across)];
      boxes.set(one.name, box(one, left + column * (w + GAP), y + row * (height + GAP), w, height));
    });
    y += Math.ceil(band.length / across) * (height + GAP) - GAP + between;
  }
  const pool = { x: width / 2 - 90, y: 8, w: 180, h: 22 };
  return { boxes, pool, height: Math.max(120, y - between + 10) };
}

// How far apart dots are, so that so many find room in this rectangle.
export function pitch(rect, dots) {
  const fits = (p) => Math.floor(rect.w / p) * Math.floor(rect.h / p) >= dots;
  return PITCHES.find(fits) ?? PITCHES.at(-1);
}

export function cell(rect, p, slot) {
  const columns = Math.max(1, Math.floor(rect.w / p));
  const rows = Math.max(1, Math.floor(rect.h / p));
  const row = Math.min(rows - 1, Math.floor(slot / columns));
  return { x: rect.x + ((slot % columns) + 0.5) * p, y: rect.y + (row + 0.5) * p };
}
