// Painting of a track: each pixel has the mixture of what lies in its bytes, and rare things stay visible.

const LEAST = 0.55, NARROWEST = 3;

// An image of `lines` lines, `width` pixels each, of the bytes from `low` to `high` of a track.
function paint(track, low, high, lines, width, hidden) {
  const pixels = lines * width, perByte = pixels / (high - low);
  const colours = track.classes.map((one) => channels(one.colour));
  const faint = channels(CONTENT[HOLE].colour);
  const strong = track.classes.map((one) => one.strong && !hidden.has(one.key));
  track.classes.forEach((one, index) => { if (hidden.has(one.key)) colours[index] = faint; });
  const image = new ImageData(width, lines), out = image.data;
  const sums = new Float32Array(pixels * 8);  // weight and colour of what is strong, and of the rest

  function add(pixel, which, weight) {
    const colour = colours[which], at = pixel * 8 + (strong[which] ? 0 : 4);
    sums[at] += weight;
    sums[at + 1] += weight * colour[0];
    sums[at + 2] += weight * colour[1];
    sums[at + 3] += weight * colour[2];
  }
  function spread(from, to, which, share) {
    const first = Math.floor(from), last = Math.min(Math.ceil(to), pixels);
    if (last - first <= 1) return add(Math.min(first, pixels - 1), which, (to - from) * share);
    add(first, which, (first + 1 - from) * share);
    for (let pixel = first + 1; pixel < last - 1; pixel++) add(pixel, which, share);
    return add(last - 1, which, (to - last + 1) * share);
  }

  const start = track.start;
  for (let row = rowAt(track, low); row < track.count && start[row] < high; row++) {
    const from = (Math.max(start[row], low) - low) * perByte, to = (Math.min(start[row + 1], high) - low) * perByte;
    if (to <= from) continue;
    const mixture = track.mixture && track.mixture(row);
    if (!mixture) {
      const which = track.classOf(row), least = strong[which] ? Math.min(from + NARROWEST, (Math.floor(from / width) + 1) * width) : to;
      spread(from, Math.max(to, least), which, 1);
    }
    else {
      const length = start[row + 1] - start[row];
      mixture.forEach((bytes, which) => { if (bytes) spread(from, to, which, bytes / length); });
    }
  }
  for (let pixel = 0; pixel < pixels; pixel++) {
    const at = pixel * 8, clear = sums[at], rest = sums[at + 4], to = pixel * 4;
    const part = clear > 0 ? Math.max(clear / (clear + rest), rest > 0 ? LEAST : 1) : 0;
    for (let channel = 1; channel < 4; channel++) {
      const one = clear > 0 ? sums[at + channel] / clear : 0, other = rest > 0 ? sums[at + 4 + channel] / rest : 0;
      out[to + channel - 1] = part * one + (1 - part) * other;
    }
    out[to + 3] = clear + rest > 0 ? 255 : 0;
  }
  return image;
}

const scratch = document.createElement("canvas");

// Draw the lines of an image, each `height` high, the first at `top` and each next one `step` lower.
function drawLines(context, image, left, top, height, step) {
  scratch.width = image.width;
  scratch.height = image.height;
  scratch.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  for (let line = 0; line < image.height; line++) {
    context.drawImage(scratch, 0, line, image.width, 1, left, top + line * step, image.width, height);
  }
}
