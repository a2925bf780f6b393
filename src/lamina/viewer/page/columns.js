// Columns of numbers from text, and the rows that they make: of a disk, of ranges, and of a file.

const DATA = 1, ZERO = 2, PRESENT = 4, COMPRESSED = 8;

class Columns {
  constructor(base64) {
    this.bytes = inflate(bytesOf(base64));
    this.at = 0;
  }

  // The next `count` numbers, seven bits in each byte, the lowest first.
  next(count) {
    const bytes = this.bytes, found = new Float64Array(count);
    let at = this.at;
    for (let index = 0; index < count; index++) {
      let byte = bytes[at++], value = byte & 127;
      if (byte > 127) {
        let factor = 128;
        do {
          byte = bytes[at++];
          value += (byte & 127) * factor;
          factor *= 128;
        } while (byte > 127);
      }
      found[index] = value;
    }
    this.at = at;
    return found;
  }
}

// The status of a disk. Row i is from start[i] to start[i + 1]; `file` is -1 and `offset` -1 without a place.
function readStatus(told) {
  const columns = new Columns(told.columns), count = told.rows;
  const length = columns.next(count), code = columns.next(count), file = columns.next(count);
  const jump = columns.next(told.stored);
  const rows = emptyRows(count);
  rows.count = count;
  let at = 0, expected = 0, stored = 0;
  for (let row = 0; row < count; row++) {
    rows.start[row] = at;
    const size = length[row] * told.unit;
    at += size;
    rows.flags[row] = code[row] % 16;
    rows.depth[row] = Math.floor(code[row] / 16);
    rows.file[row] = file[row] - 1;
    if (file[row]) {
      const signed = jump[stored++];
      expected += (signed % 2 ? -(signed + 1) / 2 : signed / 2) * told.step;
      rows.offset[row] = expected;
      expected += size;
    } else rows.offset[row] = -1;
  }
  rows.start[count] = at;
  rows.grain = told.grain;
  if (told.grain > 1) {
    rows.begins = columns.next(count);
    rows.counts = [];
    for (let index = 0; index < CONTENT.length; index++) rows.counts.push(columns.next(count));
  }
  return rows;
}

function emptyRows(most) {
  return {
    count: 0, grain: 1, begins: null, counts: null,
    start: new Float64Array(most + 1), flags: new Uint8Array(most), depth: new Uint16Array(most),
    file: new Int16Array(most), offset: new Float64Array(most),
  };
}

// Whether several extents are one row, of which the page has only counts.
function isCoarse(rows, row) {
  return rows.counts !== null && (rows.begins[row] > 1 || rows.counts.filter((column) => column[row]).length > 1);
}

// Ranges as edges from 0 to `size`: rows with an odd number are inside the ranges.
function readRanges(told, size) {
  const columns = new Columns(told.columns), gap = columns.next(told.rows), length = columns.next(told.rows);
  const start = new Float64Array(2 * told.rows + 2);
  let at = 0;
  for (let index = 0; index < told.rows; index++) {
    start[2 * index + 1] = at += gap[index] * told.unit;
    start[2 * index + 2] = at = Math.min(at + length[index] * told.unit, size);
  }
  start[2 * told.rows + 1] = size;
  return { start, count: 2 * told.rows + 1, grain: told.grain, total: told.total };
}

// The parts of a file: `references` is -1 if nobody counts.
function readMap(told, size) {
  const columns = new Columns(told.columns), length = columns.next(told.rows - 1), kind = columns.next(told.rows);
  const references = columns.next(told.rows), start = new Float64Array(told.rows + 1);
  for (let row = 1; row < told.rows; row++) start[row] = start[row - 1] + length[row - 1] * told.unit;
  start[told.rows] = size;
  return { start, count: told.rows, kind, references: references.map((one) => one - 1), grain: told.grain };
}

// The L2 tables of a layer: number of the L1 entry, and offset.
function readRoute(told) {
  const columns = new Columns(told.columns), entry = columns.next(told.rows), table = columns.next(told.rows);
  for (let row = 1; row < told.rows; row++) entry[row] += entry[row - 1];
  return { ...told, entry, table };
}

// The number of the row that contains the byte at `position`.
function rowAt(rows, position) {
  let low = 0, high = rows.count - 1;
  while (low < high) {
    const middle = low + high + 1 >> 1;
    if (rows.start[middle] <= position) low = middle;
    else high = middle - 1;
  }
  return low;
}
