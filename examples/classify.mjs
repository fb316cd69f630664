// Classify .npy and plain FITS cutouts in Node.js: node classify.mjs MODEL.onnx FILE.npy ...

import { readFile } from 'node:fs/promises';
import { checkAnswers, checkImage, describe, judge, readImages } from './formats.mjs';

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

async function classify(name, image, model) {
  checkImage(image, model);
  const images = new ort.Tensor('float32', image, [1, 1, model.side, model.side]);
  const outputs = await model.session.run({ images });
  const { prediction, probabilities, familiarity } = judge(outputs, model);
  const values = model.labels.map((label, i) => `${label}=${probabilities[i].toFixed(6)}`);
  if (familiarity !== null) values.push(`familiarity=${familiarity.toFixed(6)}`);
  console.log(oneLine(`${name} ${prediction} ${values.join(' ')}`));
}

const [path, ...files] = process.argv.slice(2);
if (!files.length) {
  console.error('error: give a model and files: node classify.mjs MODEL.onnx FILE.npy ...');
  process.exit(2);
}
const ort = await import('onnxruntime-web').catch(() => {
  console.error('error: onnxruntime-web is not there: npm ci --prefix examples --ignore-scripts');
  process.exit(1);
});
ort.env.wasm.numThreads = 1;
const model = await attempt(path, async () => {
  const content = await readFile(path);
  const session = await ort.InferenceSession.create(content);
  await checkAnswers(session, content, ort.Tensor);
  return describe(session, content, path);
});
if (model?.warning) console.error(oneLine(model.warning));
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
