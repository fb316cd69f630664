// onnxruntime in a thread of its own: opens the models beside the page, reads files and classifies
// their images, one request of app.mjs after the other.

import * as ort from '../node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs';
import {
  checkAnswers, checkImage, dataOf, describe, judge, readImages, requireOutput, smoothRms,
} from '../formats.mjs';

let classifier;
let maps;
let images = []; // of the file that was opened last

async function fetchBytes(name) {
  const url = new URL(name.split('/').map(encodeURIComponent).join('/'), import.meta.url);
  // Else the browser may go on with a file that has been replaced since.
  const response = await fetch(url, { cache: 'no-cache' });
  if (!response.ok) throw new Error(`there is no ${name} beside this page`);
  return response.arrayBuffer();
}

/** Returns what `use` makes of a session, its file's content (Uint8Array) and name. */
async function openModel(name, content, use) {
  try {
    const session = await ort.InferenceSession.create(content);
    const model = use(session, content, name);
    await checkAnswers(session, content, ort.Tensor);
    return model;
  } catch (error) {
    throw new Error(`${name}: ${error.message}`);
  }
}

/** {session, sigma: the unit of its maps or null, doubt: a line if it was trained on other data}. */
function describeMaps(session, content, name) {
  requireOutput(session, 'residual');
  const side = session.inputMetadata[0].shape.at(-1);
  if (side !== classifier.side) throw new Error(`for images of ${side} pixels, not ${classifier.side}`);
  const { data } = classifier;
  const doubt = data !== null && dataOf(content) === data ? null
    : `${name} was trained on other data than the classifier, or one of them does not say on which: ` +
      'residuals and maps may mean nothing.';
  return { session, sigma: smoothRms(content), doubt };
}

const actions = {
  /** `contents` are those of the two files, which the page has fetched. */
  async models(contents) {
    ort.env.wasm.numThreads = 1; // more need headers that a static host may not send
    ort.env.wasm.wasmBinary = await fetchBytes('../node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm');
    classifier = await openModel('classifier.onnx', contents[0], describe);
    maps = await openModel('reconstruction.onnx', contents[1], describeMaps);
    const { session, ...stated } = classifier;
    const hasFamiliarity = session.outputNames.includes('familiarity');
    return { ...stated, hasFamiliarity, sigma: maps.sigma, doubt: maps.doubt };
  },

  /** The number of images of a file: a File, or a path beside the page. */
  async open(file) {
    images = []; // of a file that cannot be read there are none
    images = readImages(await (file instanceof File ? file.arrayBuffer() : fetchBytes(file)), classifier.side);
    return images.length;
  },

  async classify(index) {
    const image = images[index].slice(); // a view would take the whole file along
    checkImage(image, classifier);
    const input = { images: new ort.Tensor('float32', image, [1, 1, classifier.side, classifier.side]) };
    const answer = judge(await classifier.session.run(input), classifier);
    const { residual, score } = await maps.session.run(input);
    const map = residual.data;
    const rms = Math.sqrt(map.reduce((sum, x) => sum + x * x, 0) / map.length);
    return { ...answer, image, map, rms, residual: score.data[0] };
  },
};

onmessage = async ({ data: [action, argument] }) => {
  try {
    postMessage({ value: await actions[action](argument) });
  } catch (error) {
    postMessage({ error: error.message });
  }
};
