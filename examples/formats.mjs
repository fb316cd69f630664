// What the examples read: .npy files of plain numbers (the pickled object arrays of the benchmark's
// axion files are refused), and the class names in an exported model.

const READERS = {
  f4: [4, (view, at, little) => view.getFloat32(at, little)],
  f8: [8, (view, at, little) => view.getFloat64(at, little)],
  i2: [2, (view, at, little) => view.getInt16(at, little)],
  i4: [4, (view, at, little) => view.getInt32(at, little)],
  u1: [1, (view, at) => view.getUint8(at)],
  u2: [2, (view, at, little) => view.getUint16(at, little)],
};

/** ArrayBuffer of a .npy file -> {shape, data: Float32Array in row-major order}; throws Error. */
export function parseNpy(buffer) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (bytes.length < 10 || String.fromCharCode(...bytes.slice(1, 6)) !== 'NUMPY') {
    throw new Error('not a .npy file');
  }
  const wide = bytes[6] > 1;
  const start = wide ? 12 : 10;
  const length = wide ? view.getUint32(8, true) : view.getUint16(8, true);
  if (length > 4096 || start + length > bytes.length) throw new Error('a broken .npy header');
  const header = new TextDecoder('latin1').decode(bytes.slice(start, start + length));
  const descr = /'descr':\s*'([<>|=])(\w+)'/.exec(header);
  const shapeText = /'shape':\s*\(([\d,\s]*)\)/.exec(header);
  if (!descr || !shapeText || !(descr[2] in READERS)) {
    throw new Error('not an array of plain numbers');
  }
  if (/'fortran_order':\s*True/.test(header)) throw new Error('column-major arrays are not read');
  const shape = shapeText[1].split(',').map((n) => n.trim()).filter(Boolean).map(Number);
  const count = shape.reduce((product, n) => product * n, 1);
  const [size, read] = READERS[descr[2]];
  if (bytes.length - start - length !== count * size) throw new Error('the file is truncated');
  const little = descr[1] !== '>';
  const data = new Float32Array(count);
  for (let i = 0; i < count; i++) data[i] = read(view, start + length + i * size, little);
  return { shape, data };
}

/** Class names of an exported classifier (Uint8Array): onnxruntime-web has no way to ask for them. */
export function classNames(model) {
  // A metadata entry of the protobuf: field 1 is the key, field 2 (tag 0x12) the length and the text.
  const text = new TextDecoder('latin1').decode(model);
  const key = '\x0a\x0bclass_names\x12';
  const at = text.indexOf(key) + key.length;
  if (at < key.length) throw new Error('the model has no class names: export it with export.py');
  let length = 0;
  let end = at;
  for (let shift = 0; ; shift += 7) {
    length += (model[end] & 0x7f) << shift;
    if (model[end++] < 0x80) break;
  }
  return JSON.parse(new TextDecoder().decode(model.slice(end, end + length)));
}
