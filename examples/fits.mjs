// The image in a plain FITS file, as predict.py reads it (FITS standard 4.0, sections 3 to 5 and 7.1). A file that
// asks for a choice, a unit or decompression is refused: predict.py has options for it.

const BLOCK = 2880; // bytes
const CARD = 80;
const MAX_AXES = 8;
const LEFT = 'predict.py reads such files, this page does not';

// BITPIX: bytes, how to read one, and whether astropy scales it in float32.
const NUMBERS = {
  8: [1, (view, at) => view.getUint8(at), true],
  16: [2, (view, at) => view.getInt16(at), true],
  32: [4, (view, at) => view.getInt32(at), false],
  '-32': [4, (view, at) => view.getFloat32(at), true],
  '-64': [8, (view, at) => view.getFloat64(at), false],
};
// Cards that say the unit of the pixels, see lib/units.py.
const UNITS = ['BUNIT', 'MAGZERO', 'MAGZPT', 'ZEROPT', 'PHOTZPT', 'PHOTFLAM'];
// Words in the name of an HDU that holds something else than the sky, see lib/fits.py.
export const NO_SKY = new Set(('WHT WEIGHT WEIGHTS IVAR INVVAR ERR ERROR ERRORS RMS SIGMA STD STDDEV VAR VARIANCE ' +
  'NOISE UNCERT SNR CHI MASK FLAG FLAGS DQ BPM SEG SEGM SEGMENTATION CTX CON CONTEXT COVERAGE EXP EXPTIME EXPOSURE ' +
  'AREA PSF KERNEL BKG BACKGROUND SKY MODEL RESID RESIDUAL RESIDUALS').split(' '));

const ascii = (bytes) => String.fromCharCode(...bytes);

/** Whether a file (Uint8Array) is FITS by its first bytes; throws Error if it is compressed. */
export function isFits(bytes) {
  const start = ascii(bytes.subarray(0, 9));
  if (start.startsWith('\x1f\x8b') || start.startsWith('BZh')) throw new Error(`a compressed file: ${LEFT}`);
  return /^SIMPLE {2}=?/.test(start);
}

/** A FITS file (ArrayBuffer) of one image -> {shape, data: Float32Array in row-major order}; throws Error. */
export function parseFits(buffer) {
  const units = [];
  for (let at = 0; at < buffer.byteLength;) {
    const unit = readUnit(new Uint8Array(buffer, at), at);
    if (!unit) break; // what follows the last HDU
    units.push(unit);
    at = unit.end;
  }
  if (units.some(({ cards }) => cards.get('ZIMAGE') === true)) throw new Error(`compressed by fpack: ${LEFT}`);
  const images = units.filter(({ isImage, shape }) => isImage && shape.length >= 2);
  if (!images.length) throw new Error('there is no image in this FITS file');
  if (images.length > 1) throw new Error(`${images.length} images in one FITS file: ${LEFT}`);
  const [image] = images;
  if (image.shape.length > 2) throw new Error(`a cube of shape (${image.shape.join(', ')}): ${LEFT}`);
  const name = String(image.cards.get('EXTNAME') ?? '').toUpperCase();
  if (name.split(/[^A-Z]+/).some((word) => NO_SKY.has(word))) throw new Error(`its image is called ${name}: no sky`);
  const cards = units[0] === image || units[0].shape.length ? image.cards : new Map([...units[0].cards, ...image.cards]);
  const unit = UNITS.find((card) => cards.has(card) && cards.get(card) !== '');
  if (unit) {
    throw new Error(`its header says the unit (${unit}), and this page takes pixels as they are: predict.py brings ` +
      'them to the unit of the network');
  }
  return { shape: image.shape, data: pixelsOf(image, buffer) };
}

/** An HDU that begins with these bytes, at `offset` of the file; null if none does. */
function readUnit(bytes, offset) {
  const first = ascii(bytes.subarray(0, 8));
  if (first !== (offset ? 'XTENSION' : 'SIMPLE  ')) return null;
  const cards = new Map();
  let at = 0;
  for (let key = ''; key !== 'END'; at += CARD) {
    if (at + CARD > bytes.length) throw new Error('not a whole FITS header');
    const card = ascii(bytes.subarray(at, at + CARD));
    key = card.slice(0, 8).trimEnd();
    if (card.slice(8, 10) === '= ' && !cards.has(key)) cards.set(key, valueOf(card.slice(10)));
  }
  const whole = (key, usual) => {
    const value = cards.get(key) ?? usual;
    if (!Number.isSafeInteger(value) || value < 0) throw new Error(`${key} in its header is no size`);
    return value;
  };
  const count = whole('NAXIS');
  if (count > MAX_AXES) throw new Error(`${count} axes: no image`);
  const axes = Array.from({ length: count }, (_, i) => whole(`NAXIS${i + 1}`));
  const size = Math.abs(cards.get('BITPIX')) / 8;
  const numbers = count ? axes.reduce((product, n) => product * n, 1) : 0;
  const length = size * whole('GCOUNT', 1) * (whole('PCOUNT', 0) + numbers);
  const start = offset + Math.ceil(at / BLOCK) * BLOCK;
  if (!Number.isSafeInteger(length) || start + length > offset + bytes.length) {
    if (length !== 0) throw new Error('shorter than its header says, or no FITS file; is it truncated?');
  }
  return {
    cards,
    isImage: offset ? cards.get('XTENSION') === 'IMAGE' : cards.get('SIMPLE') === true && cards.get('GROUPS') !== true,
    shape: withoutUnitAxes(axes.reverse()),
    start,
    end: start + Math.ceil(length / BLOCK) * BLOCK,
  };
}

/** The value of a card: text, number, true or false; null if it is none of these. */
function valueOf(text) {
  const quoted = /^ *'((?:[^']|'')*)'/.exec(text);
  if (quoted) return quoted[1].replaceAll("''", "'").trimEnd();
  const bare = text.split('/')[0].trim();
  if (bare === 'T' || bare === 'F') return bare === 'T';
  return /^[+-]?(\d+\.?\d*|\.\d+)([ED][+-]?\d+)?$/i.test(bare) ? Number(bare.replace(/d/i, 'e')) : null;
}

/** A shape without its leading axes of length one, then trailing ones, down to two axes. */
function withoutUnitAxes(shape) {
  let left = shape;
  while (left.length > 2 && (left[0] === 1 || left.at(-1) === 1)) {
    left = left[0] === 1 ? left.slice(1) : left.slice(0, -1);
  }
  return left;
}

/** The pixels, scaled by BSCALE and BZERO; NaN where an integer is BLANK. */
function pixelsOf({ cards, shape, start }, buffer) {
  const bitpix = cards.get('BITPIX');
  if (!Object.hasOwn(NUMBERS, bitpix)) throw new Error(`pixels of BITPIX ${bitpix}: ${LEFT}`);
  const [size, read, isSingle] = NUMBERS[bitpix];
  const rounded = isSingle ? Math.fround : (x) => x;
  const [scale, zero] = [['BSCALE', 1], ['BZERO', 0]].map(([key, usual]) => {
    const value = cards.has(key) ? cards.get(key) : usual;
    if (!Number.isFinite(value)) throw new Error(`${key} in its header is no number`);
    return rounded(value);
  });
  const blank = bitpix > 0 ? cards.get('BLANK') : undefined;
  const view = new DataView(buffer, start);
  return Float32Array.from({ length: shape[0] * shape[1] }, (_, i) => {
    const stored = read(view, i * size);
    return stored === blank ? NaN : rounded(rounded(stored * scale) + zero);
  });
}
