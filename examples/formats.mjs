// What the examples read: .npy and plain FITS files as predict.py reads them, and what an exported model says of
// itself. The pickles in numpy's object arrays are read as data: nothing in a file is executed.

import { isFits, parseFits } from './fits.mjs';

const MAX_PICKLE_BYTES = 64 * 2 ** 20;
const MAX_PICKLE_OPCODES = 100_000;
const MAX_DIMENSIONS = 8;

// Number kinds of numpy: bytes, and how to read one.
const NUMBERS = {
  f2: [2, (view, at, little) => half(view.getUint16(at, little))],
  f4: [4, (view, at, little) => view.getFloat32(at, little)],
  f8: [8, (view, at, little) => view.getFloat64(at, little)],
  i1: [1, (view, at) => view.getInt8(at)],
  i2: [2, (view, at, little) => view.getInt16(at, little)],
  i4: [4, (view, at, little) => view.getInt32(at, little)],
  i8: [8, (view, at, little) => Number(view.getBigInt64(at, little))],
  u1: [1, (view, at) => view.getUint8(at)],
  u2: [2, (view, at, little) => view.getUint16(at, little)],
  u4: [4, (view, at, little) => view.getUint32(at, little)],
  u8: [8, (view, at, little) => Number(view.getBigUint64(at, little))],
  b1: [1, (view, at) => Number(view.getUint8(at) !== 0)],
};

function half(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0x1f) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

/** The images of a .npy or FITS file (ArrayBuffer): [Float32Array of side² pixels]; throws Error. */
export function readImages(buffer, side) {
  const { shape, data } = isFits(new Uint8Array(buffer)) ? parseFits(buffer) : parseNpy(buffer);
  let sizes = shape;
  if (sizes.length === 4 && sizes[1] === 1) sizes = [sizes[0], sizes[2], sizes[3]];
  else if ([3, 4].includes(sizes.length) && sizes.at(-1) === 1) sizes = sizes.slice(0, -1);
  if (sizes.length === 2) sizes = [1, ...sizes];
  const [count, height, width] = sizes;
  if (sizes.length !== 3 || count === 0 || height !== side || width !== side) {
    const isLarger = height >= side && width >= side && count > 0;
    throw new Error(`not an image of ${side}×${side} pixels or a stack of them, but of shape ` +
      `(${shape.join(', ')})${isLarger ? '; predict.py --crop takes the centre of larger ones' : ''}`);
  }
  const pixels = side * side;
  return Array.from({ length: count }, (_, i) => data.subarray(i * pixels, (i + 1) * pixels));
}

/** Throws Error unless all numbers are finite. */
export function checkFinite(numbers, message = 'NaN or infinite pixels') {
  if (!numbers.every(Number.isFinite)) throw new Error(message);
}

/** A .npy file (ArrayBuffer) -> {shape, data: Float32Array in row-major order}; throws Error. */
function parseNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (bytes.length < 12 || latin1(bytes.subarray(0, 6)) !== '\x93NUMPY') {
    throw new Error('not a .npy or FITS file');
  }
  const [major, minor] = bytes.subarray(6, 8);
  if (![1, 2].includes(major) || minor !== 0) throw new Error('not an array of plain numbers');
  const start = major === 1 ? 10 : 12;
  const length = major === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  if (length > 4096 || start + length > bytes.length) throw new Error('not a whole .npy header');
  const header = parseHeader(bytes.subarray(start, start + length));
  const content = bytes.subarray(start + length);
  if (header.kind === 'O') return stackOf(imagesOf(unpickle(content)));
  return numbersOf(content, header.kind, header.byteOrder, header.shape, header.columnMajor);
}

/** The header of a .npy file, a Python dict: {'descr': '<f8', 'fortran_order': False, ...}. */
function parseHeader(bytes) {
  const [, body] = /^\{ *(.*)\}$/.exec(latin1(bytes).trim()) ?? [];
  const entry = /(['"])(\w+)\1 *: *(True|False|'[^'\\]*'|"[^"\\]*"|\([\d, ]*\)) *(, *|$)/gy;
  const entries = [...(body ?? '').matchAll(entry)];
  const values = new Map(entries.map(([, , key, value]) => [key, value]));
  const descr = /^.([<>|=]?)(\w+).$/.exec(values.get('descr'));
  const order = values.get('fortran_order');
  const shape = /^\((.*)\)$/.exec(values.get('shape'));
  const read = entries.reduce((total, [text]) => total + text.length, 0);
  if (read !== body?.length || values.size !== 3 || !descr || !shape
      || !['True', 'False'].includes(order)) {
    throw new Error('not an array of plain numbers');
  }
  return {
    byteOrder: descr[1],
    kind: descr[2],
    columnMajor: order === 'True',
    shape: shape[1].split(',').map((n) => n.trim()).filter(Boolean).map(Number),
  };
}

function latin1(bytes) {
  return Array.from(bytes, (byte) => String.fromCharCode(byte)).join('');
}

function checkShape(shape) {
  const isSize = (n) => Number.isInteger(n) && n >= 0;
  if (!Array.isArray(shape) || shape.length > MAX_DIMENSIONS || !shape.every(isSize)) {
    throw new Error('not the shape of an array');
  }
}

function product(shape) {
  return shape.reduce((total, n) => total * n, 1);
}

/** Bytes of numpy's array memory -> {shape, data: Float32Array in row-major order}. */
function numbersOf(bytes, kind, byteOrder, shape, columnMajor) {
  if (!Object.hasOwn(NUMBERS, kind)) throw new Error('not an array of plain numbers');
  checkShape(shape);
  const [size, read] = NUMBERS[kind];
  const count = product(shape);
  if (bytes.length !== count * size) throw new Error('not as long as its shape says');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const data = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    const from = columnMajor ? columnMajorIndex(i, shape) : i;
    data[i] = read(view, from * size, byteOrder !== '>');
  }
  return { shape, data };
}

/** Place in a column-major array of what is at place `index` in the row-major one. */
function columnMajorIndex(index, shape) {
  let place = 0;
  let stride = product(shape);
  for (const size of [...shape].reverse()) {
    stride /= size;
    place += (index % size) * stride;
    index = Math.floor(index / size);
  }
  return place;
}

// Object arrays

/** An array in a pickle: `value` is {shape, data}, or of an object array its list of elements. */
class PickledArray {
  value = null;
}

/** A data type in a pickle. */
class PickledType {
  byteOrder = '=';

  constructor(kind) {
    this.kind = kind;
  }
}

/** The array that numpy pickled (Uint8Array); throws Error for all but arrays and numbers. */
function unpickle(bytes) {
  if (bytes.length > MAX_PICKLE_BYTES) throw new Error('not one image: too large an object array');
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const refused = () => new Error('not a pickle of arrays and numbers alone');
  const stack = [];
  const marks = [];
  const memo = new Map();
  let at = 0;
  let decoded = 0;

  const skip = (n) => {
    if (n < 0 || n > bytes.length - at) throw new Error('not a whole pickle');
    at += n;
    return at - n;
  };
  const take = (n) => {
    const start = skip(n);
    return bytes.subarray(start, start + n);
  };
  const byte = () => bytes[skip(1)];
  const frame = () => {
    const length = Number(view.getBigUint64(skip(8), true));
    if (length > bytes.length - at) throw new Error('not a whole pickle');
  };
  const uint = () => view.getUint32(skip(4), true);
  const line = () => {
    const text = latin1(take(bytes.indexOf(10, at) - at));
    skip(1);
    return text;
  };
  const text = (n) => new TextDecoder().decode(take(n));
  const pop = () => {
    if (!stack.length) throw refused();
    return stack.pop();
  };
  const popToMark = () => {
    if (!marks.length) throw refused();
    return stack.splice(marks.pop());
  };
  const popTuple = (n) => {
    if (stack.length < n) throw refused();
    return stack.splice(stack.length - n);
  };
  const append = (items) => {
    if (!Array.isArray(stack.at(-1))) throw refused();
    stack.at(-1).push(...items);
  };
  const recall = (index) => {
    if (!memo.has(index)) throw refused();
    return memo.get(index);
  };
  const numbers = (content, type, shape, columnMajor) => {
    if (!(content instanceof Uint8Array && type instanceof PickledType)) throw refused();
    decoded += content.length;
    if (decoded > bytes.length) throw refused(); // the same bytes again and again
    return numbersOf(content, type.kind, type.byteOrder, shape, columnMajor);
  };

  // What numpy's pickles call.
  const functions = {
    ndarray: () => { throw refused(); }, // only ever an argument of _reconstruct
    dtype: (kind) => new PickledType(kind),
    _reconstruct: () => new PickledArray(),
    scalar: (type, content) => numbers(content, type, [], false).data[0],
  };
  const find = (module, name) => {
    const inNumpy = module === 'numpy' && ['ndarray', 'dtype'].includes(name);
    const inCore = ['numpy.core.multiarray', 'numpy._core.multiarray'].includes(module)
      && ['_reconstruct', 'scalar'].includes(name);
    if (!inNumpy && !inCore) throw refused();
    return functions[name];
  };
  const call = (callable, args) => {
    if (typeof callable !== 'function' || !Array.isArray(args)) throw refused();
    return callable(...args);
  };
  const build = (object, state) => {
    if (!Array.isArray(state)) throw refused();
    if (object instanceof PickledType) {
      if (!['<', '>', '|', '='].includes(state[1])) throw refused();
      object.byteOrder = state[1];
    } else if (object instanceof PickledArray) {
      const [, shape, type, columnMajor, content] = state;
      object.value = type?.kind === 'O8' && Array.isArray(content)
        ? rowsOf(content, shape)
        : numbers(content, type, shape, columnMajor === true);
    } else {
      throw refused();
    }
  };

  const opcodes = {
    '\x80': () => { if (byte() > 5) throw refused(); }, // PROTO
    '\x95': () => { frame(); }, // FRAME
    'c': () => stack.push(find(line(), line())), // GLOBAL
    '\x93': () => stack.push(find(...popTuple(2))), // STACK_GLOBAL
    'R': () => stack.push(call(...popTuple(2))), // REDUCE
    'b': () => { const state = pop(); build(stack.at(-1), state); }, // BUILD
    '(': () => marks.push(stack.length), // MARK
    't': () => stack.push(popToMark()), // TUPLE
    '\x85': () => stack.push(popTuple(1)),
    '\x86': () => stack.push(popTuple(2)),
    '\x87': () => stack.push(popTuple(3)),
    ')': () => stack.push([]), // EMPTY_TUPLE
    ']': () => stack.push([]), // EMPTY_LIST
    'a': () => append([pop()]), // APPEND
    'e': () => append(popToMark()), // APPENDS
    'N': () => stack.push(null), // NONE
    '\x88': () => stack.push(true),
    '\x89': () => stack.push(false),
    'J': () => stack.push(view.getInt32(skip(4), true)), // BININT
    'K': () => stack.push(byte()), // BININT1
    'M': () => stack.push(view.getUint16(skip(2), true)), // BININT2
    '\x8a': () => stack.push( // LONG1
      take(byte()).reduceRight((n, b, i, all) =>
        256 * n + (i === all.length - 1 && b > 127 ? b - 256 : b), 0)),
    'G': () => stack.push(view.getFloat64(skip(8))), // BINFLOAT
    'X': () => stack.push(text(uint())), // BINUNICODE
    '\x8c': () => stack.push(text(byte())), // SHORT_BINUNICODE
    'B': () => stack.push(take(uint())), // BINBYTES
    'C': () => stack.push(take(byte())), // SHORT_BINBYTES
    'q': () => memo.set(byte(), stack.at(-1)), // BINPUT
    'r': () => memo.set(uint(), stack.at(-1)), // LONG_BINPUT
    '\x94': () => memo.set(memo.size, stack.at(-1)), // MEMOIZE
    'h': () => stack.push(recall(byte())), // BINGET
    'j': () => stack.push(recall(uint())), // LONG_BINGET
  };
  for (let count = 0; count < MAX_PICKLE_OPCODES; count++) {
    const code = String.fromCharCode(byte());
    if (code === '.') return pop();
    if (!Object.hasOwn(opcodes, code)) throw refused();
    opcodes[code]();
  }
  throw refused();
}

/** The elements of an object array, or of one of two axes its rows. */
function rowsOf(elements, shape) {
  checkShape(shape);
  if (shape.length > 2 || elements.length !== product(shape)) {
    throw new Error('not a list of images');
  }
  if (shape.length < 2 || !elements.length) return elements;
  const [rows, columns] = shape;
  return Array.from({ length: rows }, (_, i) => elements.slice(i * columns, (i + 1) * columns));
}

const contentOf = (element) => (element instanceof PickledArray ? element.value : element);
const isImage = (element) => element?.data instanceof Float32Array && element.shape.length > 1;
const isNumber = (element) => ['number', 'boolean'].includes(typeof element)
  || (element?.data?.length === 1 && element.shape.length < 2);

/** The images of [image, image, ...] or of rows [image, number]; the one of [image, number, ...]. */
function imagesOf(unpickled) {
  if (!(unpickled instanceof PickledArray && Array.isArray(unpickled.value))) {
    throw new Error('not an object array');
  }
  const elements = unpickled.value.map(contentOf);
  if (Array.isArray(elements[0])) {
    const parts = elements.reduce((total, row) => total + (row?.length ?? 0), 0);
    if (parts > MAX_PICKLE_OPCODES) throw new Error('not that many rows'); // one row again and again
    return elements.map(imageOfRow);
  }
  return elements.length > 1 && elements.every(isImage) ? elements : imageOfRow(elements);
}

function imageOfRow(row) {
  const [image, ...others] = Array.isArray(row) ? row.map(contentOf) : [];
  if (!isImage(image) || !others.every(isNumber)) {
    throw new Error('not an object array of an image and numbers');
  }
  return image;
}

/** One {shape, data} of several, or the one as it is. */
function stackOf(images) {
  if (!Array.isArray(images)) return images;
  const [{ shape, data }] = images;
  if (images.some((image) => String(image.shape) !== String(shape))) {
    throw new Error('not images of one shape');
  }
  if (4 * data.length * images.length > MAX_PICKLE_BYTES) throw new Error('not that many images');
  const stack = new Float32Array(data.length * images.length);
  images.forEach((image, i) => stack.set(image.data, i * data.length));
  return { shape: [images.length, ...shape], data: stack };
}

// What an exported classifier says of itself, and what its outputs mean: as predict.py has it.

export const LEAST_FAMILIARITY = 0.01; // below it an image is unlike the training images
export const UNFAMILIAR = 'unfamiliar'; // the prediction for such an image

/** The names of the classes that a classifier, the content of its file, tells apart. */
export function classNames(content) {
  const stated = metadata(content, 'class_names');
  if (stated === null) throw new Error('the model has no class names: export it with export.py');
  return JSON.parse(stated);
}

/** A session of onnxruntime-web with the content of its file (Uint8Array): what `judge` needs. */
export function describe(session, content, path) {
  requireOutput(session, 'probabilities');
  const labels = classNames(content);
  const range = pixelRange(content);
  const hasFamiliarity = session.outputNames.includes('familiarity');
  const images = Number(metadata(content, 'familiarity_images') ?? 0);
  // Among n images the least familiarity is 1/(1 + n).
  const canRefuse = hasFamiliarity && images > 0 && 1 / (1 + images) < LEAST_FAMILIARITY;
  const reason = hasFamiliarity
    ? `was calibrated on too few images to refuse any below ${LEAST_FAMILIARITY}`
    : 'gives no familiarity (fewer than 100 validation images, or an old file)';
  const guard = range ? 'only the range of pixels' : 'nothing';
  const weights = metadata(content, 'weights_sha256')?.slice(0, 8) ?? 'unknown';
  return {
    session,
    identity: `${path} tells ${labels.join(', ')} apart; SHA-256 of its weights: ${weights}.`,
    data: dataOf(content),
    side: session.inputMetadata[0].shape.at(-1),
    labels,
    range,
    canRefuse,
    warning: canRefuse ? null
      : `${path} ${reason}: ${guard} guards against images unlike the training images`,
  };
}

/** Throws Error unless a session has the output. */
export function requireOutput({ outputNames }, name) {
  if (outputNames.includes(name)) return;
  throw new Error(`gives ${outputNames.join(' and ')} instead of ${name}: are classifier and maps exchanged?`);
}

/** The rms of what an exported MAE (Uint8Array) leaves of smooth lenses, null if it is unknown. */
export function smoothRms(model) {
  const stated = Number(metadata(model, 'smooth_rms'));
  return stated > 0 && Number.isFinite(stated) ? stated : null;
}

/** The fingerprint of the images that a model (Uint8Array) was trained on, null if it is unknown. */
export function dataOf(model) {
  const stated = metadata(model, 'data_fingerprint');
  return stated === 'None' ? null : stated;
}

/** Throws Error unless a classifier takes the pixels: if it cannot refuse images, by their range. */
export function checkImage(image, { canRefuse, range }) {
  checkFinite(image);
  if (canRefuse || !range) return;
  const [low, high, faintest] = range;
  const smallest = image.reduce((a, b) => Math.min(a, b));
  const largest = image.reduce((a, b) => Math.max(a, b));
  if (low <= smallest && faintest <= largest && largest <= high) return;
  const [from, to, lowest, highest, bright] = [smallest, largest, ...range].map(short);
  throw new Error(`pixels from ${from} to ${to}, far outside those of the training images (accepted: from ` +
    `${lowest} to ${highest}, the brightest above ${bright}): another unit, sentinel values, ` +
    'hot pixels or a blank image?');
}

/** {prediction, probabilities, familiarity or null} of a classifier's outputs; throws Error. */
export function judge(outputs, { labels, canRefuse }) {
  const probabilities = outputs.probabilities.data;
  checkFinite(probabilities, 'no finite probabilities');
  const familiarity = outputs.familiarity?.data[0] ?? null;
  const isFamiliar = !canRefuse || familiarity >= Math.fround(LEAST_FAMILIARITY);
  const best = probabilities.indexOf(Math.max(...probabilities));
  return { prediction: isFamiliar ? labels[best] : UNFAMILIAR, probabilities, familiarity };
}

const short = (number) => Number(number.toPrecision(3));

/** [low, high, faintest] of the training images' pixels, or null if the model states none. */
function pixelRange(model) {
  try {
    const range = JSON.parse(metadata(model, 'pixel_range'));
    return range?.length === 3 && range.every(Number.isFinite) ? range : null;
  } catch {
    return null;
  }
}

/** A text in the metadata of a model (Uint8Array), or null; onnxruntime-web has no way to ask. */
function metadata(model, key) {
  // An entry of the protobuf: field 1 is the key, field 2 (tag 0x12) the length and the text.
  const text = new TextDecoder('latin1').decode(model);
  const start = `\x0a${String.fromCharCode(key.length)}${key}\x12`;
  const at = text.lastIndexOf(start) + start.length;
  if (at < start.length) return null;
  let length = 0;
  let end = at;
  for (let shift = 0; ; shift += 7) {
    if (end >= model.length || shift > 28) throw new Error('the model is damaged');
    length += (model[end] & 0x7f) << shift;
    if (model[end++] < 0x80) break;
  }
  return new TextDecoder().decode(model.slice(end, end + length));
}

// Images and PyTorch's answers to them, which a model carries: see lib/known_answers.py.

const LARGEST_SIDE = 160; // pixels a side that are stored of a larger image
const MOST_NUMBERS = 256; // that are stored of one answer
const TOLERANCES = {
  float32: { probabilities: 1e-3, familiarity: 0.05, residual: 1e-3, score: 1e-3 },
  float16: { probabilities: 0.05, familiarity: 0.05 },
  int8: { probabilities: 0.2, familiarity: 0.05 },
};

/** Throws Error unless a session answers as PyTorch did; `Tensor` is that of onnxruntime-web. */
export async function checkAnswers(session, content, Tensor) {
  const text = metadata(content, 'known_answers');
  if (text === null) return; // of an older version
  const { images, count, unit, answers } = JSON.parse(text);
  const side = session.inputMetadata[0].shape.at(-1);
  const step = Math.ceil(side / LARGEST_SIDE);
  const stored = Math.ceil(side / step);
  const pixels = await unpacked(images, 'f2');
  const data = Float32Array.from({ length: count * side * side }, (_, i) => {
    const [row, column] = [Math.floor(i / side) % side, i % side].map((at) => Math.floor(at / step));
    return unit * pixels[(Math.floor(i / side / side) * stored + row) * stored + column];
  });
  const outputs = await session.run({ images: new Tensor('float32', data, [count, 1, side, side]) });
  const right = {};
  const got = {};
  for (const [name, answer] of Object.entries(answers)) {
    right[name] = rowsOfNumbers(await unpacked(answer, 'f4'), count);
    got[name] = rowsOfNumbers(outputs[name].data, count).map(thinned);
  }
  const best = (row) => row.indexOf(Math.max(...row));
  for (const [name, rows] of Object.entries(right)) {
    // A familiarity is a rank among the images of the predicted class.
    const same = rows.map((_, i) => name !== 'familiarity'
      || best(right.probabilities[i]) === best(got.probabilities[i]));
    const found = difference(got[name].filter((_, i) => same[i]).flat(), rows.filter((_, i) => same[i]).flat());
    const allowed = TOLERANCES[metadata(content, 'precision')]?.[name];
    if (found <= allowed) continue;
    throw new Error(`its ${name} of the images stored in it is ${found.toPrecision(2)} from PyTorch's, ` +
      `more than ${allowed}: use another browser or onnxruntime, or export it again`);
  }
}

/** The numbers of a text: base64, zlib, and the first bytes of all numbers before the second ones. */
async function unpacked(text, kind) {
  const [size, read] = NUMBERS[kind];
  const packed = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream('deflate'));
  const planes = new Uint8Array(await new Response(stream).arrayBuffer());
  const count = planes.length / size;
  const view = new DataView(new ArrayBuffer(planes.length));
  planes.forEach((byte, i) => view.setUint8((i % count) * size + Math.floor(i / count), byte));
  return Array.from({ length: count }, (_, i) => read(view, i * size, true));
}

function rowsOfNumbers(numbers, count) {
  const length = numbers.length / count;
  return Array.from({ length: count }, (_, i) => Array.from(numbers.slice(i * length, (i + 1) * length)));
}

/** Evenly spaced numbers of an answer; the odd step meets every column of a map. */
function thinned(answer) {
  const step = Math.ceil(answer.length / MOST_NUMBERS) | 1;
  return answer.filter((_, i) => i % step === 0);
}

/** The largest difference; of numbers above one, relative to the largest that is right. */
function difference(got, right) {
  if (got.length !== right.length) return Infinity;
  const scale = right.reduce((most, x) => Math.max(most, Math.abs(x)), 1);
  const found = right.reduce((most, x, i) => Math.max(most, Math.abs(got[i] - x)), 0) / scale;
  return Number.isNaN(found) ? Infinity : found;
}
