// Figures as a reader wants them.

export function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 0.0995) return `${+(seconds * 1000).toPrecision(2)} ms`;
  if (seconds < 0.9995) return `${Math.round(seconds * 1000)} ms`;
  return `${+seconds.toPrecision(3)} s`;
}

export function ago(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

export const count = (number) => Math.round(number).toLocaleString("en");

// 99.96 % is not 100 %: what was missed must be seen.
export function percent(share) {
  if (share === null || share === undefined) return "–";
  if (share === 1 || share === 0) return `${share * 100} %`;
  return `${Math.min(99.9, Math.max(0.1, Math.round(share * 1000) / 10)).toFixed(1)} %`;
}

// A client's id, without the eight characters that the engine adds, and short enough for a line.
export function short(id) {
  const own = id.replace(/-[0-9a-f]{8}$/, "");
  return own.length > 26 ? `${own.slice(0, 12)}…${own.slice(-10)}` : own;
}
