// Rounding to blocks, by the rules of lamina.Extents.align: a block is data, present or compressed if any part of it is, and zero
// if all of it is; it has a place only if its parts follow one another in one file; its depth is the smallest of those parts that
// a layer owns, or of all if none is owned. Neighbours that are equal become one row.

function align(rows, alignment) {
  const { count, start, flags, depth, file, offset } = rows;
  const found = emptyRows(2 * count), end = start[count];

  function follows(row) {
    return file[row] === file[row - 1] && file[row] >= 0 && offset[row] === offset[row - 1] + start[row] - start[row - 1];
  }
  function emit(from, to, bits, layer, host, place) {
    const last = found.count - 1;
    if (last >= 0 && found.flags[last] === bits && found.depth[last] === layer) {
      const both = found.file[last] < 0 && host < 0;
      if (both || found.file[last] === host && found.offset[last] + from - found.start[last] === place) {
        found.start[last + 1] = to;
        return;
      }
    }
    const row = found.count++;
    found.start[row] = from;
    found.start[row + 1] = to;
    found.flags[row] = bits;
    found.depth[row] = layer;
    found.file[row] = host;
    found.offset[row] = place;
  }

  let at = count ? start[0] : 0;
  for (let row = 0; row < count;) {
    const stop = start[row + 1], place = file[row] < 0 ? -1 : offset[row] + at - start[row];
    const whole = stop === end ? end : Math.floor(stop / alignment) * alignment;
    if (whole > at) {
      emit(at, whole, flags[row], depth[row], file[row], place);
      at = whole;
      if (at === stop) row++;
      continue;
    }
    // Several rows touch this block.
    const top = Math.min(Math.floor(at / alignment) * alignment + alignment, end);
    let any = 0, all = ZERO, present = Infinity, lowest = Infinity, joined = true;
    let next = row;
    for (; next < count && start[next] < top; next++) {
      any |= flags[next];
      all &= flags[next];
      lowest = Math.min(lowest, depth[next]);
      if (flags[next] & PRESENT) present = Math.min(present, depth[next]);
      if (next > row && !follows(next)) joined = false;
    }
    joined = joined && file[row] >= 0;
    emit(at, top, any & ~ZERO | all, present < Infinity ? present : lowest, joined ? file[row] : -1, joined ? place : -1);
    at = top;
    row = start[next] > top ? next - 1 : next;
  }
  return trimmed(found);
}

// The same rows in columns that are no longer than needed.
function trimmed(rows) {
  const { count } = rows;
  return {
    ...rows, start: rows.start.slice(0, count + 1), flags: rows.flags.slice(0, count), depth: rows.depth.slice(0, count),
    file: rows.file.slice(0, count), offset: rows.offset.slice(0, count),
  };
}
