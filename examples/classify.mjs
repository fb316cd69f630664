// Classify .npy cutouts in Node.js: node classify.mjs MODEL.onnx FILE.npy ...

import { readFile } from 'node:fs/promises';
import * as ort from 'onnxruntime-web';
import { classNames, parseNpy } from './formats.mjs';

const [model, ...files] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const content = await readFile(model);
const session = await ort.InferenceSession.create(content);
const names = classNames(content);
for (const file of files) {
  const bytes = await readFile(file);
  const { shape, data } = parseNpy(
    bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
  const images = new ort.Tensor('float32', data, [1, 1, ...shape.slice(-2)]);
  const { probabilities } = await session.run({ images });
  const best = probabilities.data.indexOf(Math.max(...probabilities.data));
  const values = names.map((name, i) => `${name}=${probabilities.data[i].toFixed(6)}`);
  console.log(file, names[best], ...values);
}
