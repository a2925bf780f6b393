// Base64 and raw deflate (RFC 1951), so that the page needs nothing of the browser to read its columns.

function bytesOf(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
  return bytes;
}

// Decoding tables of a prefix code: how many codes there are of each length, and the symbols in the order of their codes.
function prefixCode(lengths) {
  const count = new Uint16Array(16), first = new Uint16Array(16);
  for (const length of lengths) count[length]++;
  count[0] = 0;
  for (let length = 1; length < 15; length++) first[length + 1] = first[length] + count[length];
  const symbols = new Uint16Array(lengths.length);
  for (let symbol = 0; symbol < lengths.length; symbol++) {
    if (lengths[symbol]) symbols[first[lengths[symbol]]++] = symbol;
  }
  return { count, symbols, quick: quickTable(lengths) };
}

// Symbol and length by the next nine bits, for codes that are no longer.
function quickTable(lengths) {
  const table = new Uint16Array(512), next = new Uint16Array(16), count = new Uint16Array(16);
  for (const length of lengths) count[length]++;
  count[0] = 0;
  for (let length = 1; length < 16; length++) next[length] = (next[length - 1] + count[length - 1]) << 1;
  for (let symbol = 0; symbol < lengths.length; symbol++) {
    const length = lengths[symbol];
    if (!length) continue;
    let code = next[length]++;
    if (length > 9) continue;
    let turned = 0;
    for (let bit = 0; bit < length; bit++, code >>= 1) turned = turned << 1 | code & 1;
    for (let at = turned; at < 512; at += 1 << length) table[at] = symbol << 4 | length;
  }
  return table;
}

const LENGTH_BASE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
const LENGTH_BITS = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE = [1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097,
  6145, 8193, 12289, 16385, 24577];
const DISTANCE_BITS = [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13];
const CODE_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];

function inflate(input) {
  let at = 0, hold = 0, held = 0, out = new Uint8Array(Math.max(1024, input.length * 4)), size = 0;

  function need(count) {
    while (held < count) {
      hold |= (at < input.length ? input[at] : 0) << held;
      at++;
      held += 8;
      if (at > input.length + 4) throw new Error("the data of this page is incomplete");
    }
  }
  function bits(count) {
    need(count);
    const value = hold & (1 << count) - 1;
    hold >>>= count;
    held -= count;
    return value;
  }
  function symbol(code) {
    need(9);
    const found = code.quick[hold & 511];
    if (found) {
      hold >>>= found & 15;
      held -= found & 15;
      return found >> 4;
    }
    let value = 0, first = 0, index = 0;
    for (let length = 1; length < 16; length++) {
      value |= bits(1);
      const count = code.count[length];
      if (value - count < first) return code.symbols[index + value - first];
      index += count;
      first = first + count << 1;
      value <<= 1;
    }
    throw new Error("the data of this page is damaged");
  }
  function grow(count) {
    if (size + count <= out.length) return;
    const larger = new Uint8Array(Math.max(out.length * 2, size + count));
    larger.set(out.subarray(0, size));
    out = larger;
  }
  function codes() {
    const literals = bits(5) + 257, distances = bits(5) + 1, used = bits(4) + 4, lengths = new Uint8Array(19);
    for (let index = 0; index < used; index++) lengths[CODE_ORDER[index]] = bits(3);
    const code = prefixCode(lengths), all = new Uint8Array(literals + distances);
    for (let index = 0; index < all.length;) {
      const found = symbol(code);
      if (found < 16) all[index++] = found;
      else {
        const value = found === 16 ? all[index - 1] : 0;
        let times = found === 16 ? 3 + bits(2) : found === 17 ? 3 + bits(3) : 11 + bits(7);
        while (times--) all[index++] = value;
      }
    }
    return [prefixCode(all.subarray(0, literals)), prefixCode(all.subarray(literals))];
  }
  function fixedCodes() {
    const lengths = new Uint8Array(288).fill(8);
    lengths.fill(9, 144, 256);
    lengths.fill(7, 256, 280);
    return [prefixCode(lengths), prefixCode(new Uint8Array(30).fill(5))];
  }

  for (let last = 0; !last;) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      at -= held >> 3;
      hold = held = 0;
      const length = input[at] | input[at + 1] << 8;
      grow(length);
      out.set(input.subarray(at + 4, at + 4 + length), size);
      at += 4 + length;
      size += length;
      continue;
    }
    const [literal, distance] = kind === 1 ? fixedCodes() : codes();
    for (;;) {
      const found = symbol(literal);
      if (found < 256) {
        if (size === out.length) grow(1);
        out[size++] = found;
      } else if (found === 256) break;
      else {
        const length = LENGTH_BASE[found - 257] + bits(LENGTH_BITS[found - 257]);
        const which = symbol(distance), back = DISTANCE_BASE[which] + bits(DISTANCE_BITS[which]);
        grow(length);
        for (let count = 0; count < length; count++, size++) out[size] = out[size - back];
      }
    }
  }
  return out.subarray(0, size);
}
