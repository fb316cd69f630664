// Classify .npy cutouts in Node.js: node classify.mjs MODEL.onnx FILE.npy ...

import { readFile } from 'node:fs/promises';
import * as ort from 'onnxruntime-web';
import { checkFinite, classNames, readImages } from './formats.mjs';

/** Await an action; if it fails, name the file in one line. */
async function attempt(name, action) {
  try {
    return await action();
  } catch (error) {
    console.error(oneLine(`${name}: ${error}`));
    process.exitCode = 1;
    return null;
  }
}

function oneLine(text) {
  return text.replace(/[\x00-\x1f\x7f-\x9f]+/g, ' ');
}

async function classify(name, image, { session, names, side }) {
  checkFinite(image);
  const images = new ort.Tensor('float32', image, [1, 1, side, side]);
  const { probabilities } = await session.run({ images });
  checkFinite(probabilities.data, 'no finite probabilities');
  const best = probabilities.data.indexOf(Math.max(...probabilities.data));
  const values = names.map((label, i) => `${label}=${probabilities.data[i].toFixed(6)}`);
  console.log(oneLine(`${name} ${names[best]} ${values.join(' ')}`));
}

const [path, ...files] = process.argv.slice(2);
ort.env.wasm.numThreads = 1;
const model = await attempt(path, async () => {
  const content = await readFile(path);
  const session = await ort.InferenceSession.create(content);
  return { session, names: classNames(content), side: session.inputMetadata[0].shape.at(-1) };
});
for (const file of model ? files : []) {
  const images = await attempt(file, async () => {
    const bytes = await readFile(file);
    return readImages(new Uint8Array(bytes).buffer, model.side);
  });
  for (const [i, image] of images?.entries() ?? []) {
    const name = images.length > 1 ? `${file}[${i}]` : file;
    await attempt(name, () => classify(name, image, model));
  }
}
