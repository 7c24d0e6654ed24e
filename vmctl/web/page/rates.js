// What a VM uses per second, from two looks at its counters; and how numbers are shown.

const RATES = ["disk_read", "disk_written", "net_received", "net_sent"];
const UNITS = ["B", "K", "M", "G", "T", "P"];

export function rates(before, after, seconds) {
  const old = before && before.pid === after.pid ? before.statistics : null;
  const now = after.statistics;
  if (!old || !now || seconds <= 0) return null;
  const used = { cpu: Math.max(0, now.cpu_ns - old.cpu_ns) / seconds / 1e9 };
  for (const name of RATES) used[name] = Math.max(0, now[name] - old[name]) / seconds;
  return used;
}

export function size(bytes) {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit && value < 10 ? 1 : 0;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

export function share(part) {
  return `${(part * 100).toFixed(part < 0.1 ? 1 : 0)} %`;
}

export function time(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString();
}

export function moment(seconds) {
  return new Date(seconds * 1000).toLocaleString();
}
