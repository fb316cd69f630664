// The page's logic: models beside the page, images from the visitor. ?files=a.npy,b.npy shows files
// that lie beside the page. start.mjs imports it.

import * as ort from '../node_modules/onnxruntime-web/dist/ort.wasm.min.mjs';
import { checkImage, dataOf, describe, judge, readImages, UNFAMILIAR } from '../formats.mjs';

const element = (id) => document.getElementById(id);

ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = new URL('../node_modules/onnxruntime-web/dist/', import.meta.url).href;

async function fetchBytes(name) {
  // Else the browser may go on with a file that has been replaced since.
  const response = await fetch(name, { cache: 'no-cache' });
  if (!response.ok) throw new Error(`there is no ${name} beside this page`);
  return response.arrayBuffer();
}

async function openClassifier(name) {
  const content = new Uint8Array(await fetchBytes(name));
  return describe(await ort.InferenceSession.create(content), content, name);
}

/** {session, doubt: a line if it was not trained on the classifier's data} of an exported MAE. */
async function openMaps(name, { side, data }) {
  const content = new Uint8Array(await fetchBytes(name));
  const session = await ort.InferenceSession.create(content);
  const ownSide = session.inputMetadata[0].shape.at(-1);
  if (ownSide !== side) throw new Error(`${name} is for images of ${ownSide} pixels, not ${side}`);
  const doubt = data !== null && dataOf(content) === data ? null
    : `${name} was trained on other data than the classifier, or one of them does not say on which: ` +
      'scores and maps may mean nothing.';
  return { session, doubt };
}

/** Draw numbers (side²) on a canvas, the first row at the bottom as astronomers have it. */
function draw(canvas, numbers, side, colour) {
  canvas.width = canvas.height = side;
  const picture = new ImageData(side, side);
  for (let i = 0; i < side * side; i++) {
    const row = side - 1 - Math.floor(i / side);
    picture.data.set([...colour(numbers[i]), 255], 4 * (row * side + (i % side)));
  }
  canvas.getContext('2d').putImageData(picture, 0, 0);
}

function imageColours(data) {
  const mean = data.reduce((sum, x) => sum + Math.abs(x), 0) / data.length || 1;
  const stretch = (x) => Math.asinh((100 * x) / mean);
  const top = stretch(data.reduce((a, b) => Math.max(a, b), 0)) || 1;
  return (x) => {
    const t = Math.max(0, stretch(x)) / top;
    return [255 * Math.min(1, 1.5 * t), 255 * t * t, 255 * Math.min(1, 0.3 + 0.6 * t) * t];
  };
}

function mapColours(data) {
  const sizes = Float32Array.from(data, Math.abs).sort();
  // Not below what a smooth lens leaves, so that its map looks empty.
  const limit = Math.max(0.02, sizes[Math.floor(0.995 * (sizes.length - 1))]);
  return (x) => {
    const t = Math.max(-1, Math.min(1, x / limit));
    return t > 0 ? [255, 255 * (1 - t), 255 * (1 - t)] : [255 * (1 + t), 255 * (1 + t), 255];
  };
}

/** Add an article that `fill` fills, or that says why it could not. */
async function addArticle(name, fill) {
  const article = document.createElement('article');
  const title = document.createElement('h2');
  title.textContent = name;
  article.append(title);
  element('results').append(article);
  try {
    await fill(article, title);
  } catch (error) {
    title.textContent = `${name}: ${error.message}`;
    title.className = 'error';
  }
}

function addLine(article, text) {
  const line = document.createElement('p');
  line.textContent = text;
  article.append(line);
}

async function showImage(name, data, { classifier, maps }, article, title) {
  checkImage(data, classifier);
  const { side } = classifier;
  const images = new ort.Tensor('float32', data, [1, 1, side, side]);
  const outputs = await classifier.session.run({ images });
  const { residual, score } = await maps.session.run({ images });
  const { prediction, probabilities, familiarity } = judge(outputs, classifier);
  title.textContent = `${name}: ${prediction}`;
  if (prediction === UNFAMILIAR) {
    article.className = UNFAMILIAR;
    addLine(article, 'Unlike the training images: the probabilities mean nothing.');
  }
  for (const [numbers, colours] of [[data, imageColours], [residual.data, mapColours]]) {
    const canvas = document.createElement('canvas');
    draw(canvas, numbers, side, colours(numbers));
    article.append(canvas, ' ');
  }
  classifier.labels.forEach((label, i) => {
    const bar = document.createElement('div');
    const filled = document.createElement('div');
    bar.className = 'bar';
    filled.style.width = `${100 * probabilities[i]}%`;
    filled.textContent = `${label} ${probabilities[i].toFixed(6)}`;
    bar.append(filled);
    article.append(bar);
  });
  if (familiarity !== null) addLine(article, `familiarity ${familiarity.toFixed(6)}`);
  addLine(article, `score of the residual ${score.data[0].toExponential(4)}`);
}

/** Show every image of a file, whose bytes `getBuffer` gets. */
async function showFile(name, getBuffer, models) {
  let images;
  try {
    images = readImages(await getBuffer(), models.classifier.side);
  } catch (error) {
    await addArticle(name, () => { throw error; });
    return;
  }
  for (const [i, image] of images.entries()) {
    const imageName = images.length > 1 ? `${name}[${i}]` : name;
    await addArticle(imageName, (...parts) =>
      showImage(imageName, image, models, ...parts));
  }
}

try {
  const classifier = await openClassifier('classifier.onnx');
  const models = { classifier, maps: await openMaps('reconstruction.onnx', classifier) };
  element('warning').textContent = classifier.warning;
  element('doubt').textContent = models.maps.doubt;
  const showFiles = async (files) => {
    for (const file of files) await showFile(file.name, () => file.arrayBuffer(), models);
  };
  element('pick').addEventListener('change', (event) => showFiles(event.target.files));
  const drop = element('drop');
  drop.addEventListener('dragover', (event) => {
    event.preventDefault();
    drop.classList.add('over');
  });
  drop.addEventListener('dragleave', () => drop.classList.remove('over'));
  drop.addEventListener('drop', (event) => {
    event.preventDefault();
    drop.classList.remove('over');
    showFiles(event.dataTransfer.files);
  });
  const asked = new URLSearchParams(location.search).get('files');
  for (const name of asked ? asked.split(',') : []) {
    await showFile(name, () => fetchBytes(name), models);
  }
  element('status').textContent = `Ready. ${classifier.identity}`;
} catch (error) {
  element('status').textContent = `${error.message}: copy the exported models into this folder.`;
  element('status').className = 'error';
}
