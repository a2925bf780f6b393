// Numbers as people read them.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

function hex(number) {
  return "0x" + number.toString(16);
}

function size(number) {
  let unit = 0, value = number;
  while (value >= 1024 && unit + 1 < UNITS.length) {
    value /= 1024;
    unit++;
  }
  const text = Number.isInteger(value) ? String(value) : value < 10 ? value.toFixed(2) : value < 100 ? value.toFixed(1) : value.toFixed(0);
  return `${text} ${UNITS[unit]}`;
}

// A size, and its bytes where the size alone is not exact.
function exactSize(number) {
  const short = size(number);
  return number < 1024 || Number.isInteger(number / 1024 ** UNITS.indexOf(short.split(" ")[1])) ? short : `${short} (${whole(number)} bytes)`;
}

function whole(number) {
  return String(number).replace(/\B(?=(\d{3})+(?!\d))/g, "\u2009");
}

function counted(number, word) {
  return `${whole(number)} ${word}${number === 1 ? "" : "s"}`;
}

function range(from, to) {
  return `${hex(from)} \u2013 ${hex(to)}`;
}

// Names in commands: a shell reads them as one word.
function quoted(word) {
  return /^[\w@%+=:,./-]+$/.test(word) ? word : "'" + word.replace(/'/g, "'\"'\"'") + "'";
}
