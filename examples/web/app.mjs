// The page's logic: files from the visitor, one after the other to worker.mjs, results into the table.
// ?files=a.npy,b.npy classifies files that lie beside the page. start.mjs imports it.

import { classNames } from '../formats.mjs';
import { droppedFiles } from './files.mjs';
import { columnsOf, csvOf, drawScale, medianRms, newElement, picturesOf, rowOf, tableOrder } from './table.mjs';

const ROW_HEIGHT = 72; // pixels, as in index.html
const FEW_PLANES = 5; // as in lib/images.py: they may also be the bands of one lens
const element = (id) => document.getElementById(id);

let model; // what the worker says of the models
let columns = [];
let results = [];
let shown = []; // the results that the filter leaves, sorted
let sigma; // the unit of the maps
let order = { column: null, sign: 1 };
const waiting = []; // {name, file} to classify
let round = 0; // grows when the results are cleared
let progress = { done: 0, total: 0, start: 0 };

// A worker from a blob keeps this page's policy: it, too, may only fetch from where the page came from.
const source = `import ${JSON.stringify(new URL('worker.mjs', import.meta.url))};`;
const worker = new Worker(URL.createObjectURL(new Blob([source], { type: 'text/javascript' })), { type: 'module' });

/** What the worker answers; one request at a time. */
function ask(action, argument) {
  return new Promise((resolve, reject) => {
    worker.onmessage = ({ data }) => ('error' in data ? reject(new Error(data.error)) : resolve(data.value));
    worker.onerror = (event) => reject(new Error(event.message ?? 'this browser cannot run a module in a Worker'));
    worker.postMessage([action, argument]);
  });
}

function addError(text) {
  element('errors').append(newElement('li', text));
  element('failures').hidden = false;
}

const counted = (count, what) => `${count.toLocaleString('en')} ${what}${count === 1 ? '' : 's'}`;

function showProgress() {
  const { done, total, start } = progress;
  const seconds = ((performance.now() - start) / 1000 / Math.max(1, done)) * (total - done);
  const left = seconds < 100 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
  const finished = total ? counted(results.length, 'image') : '';
  element('progress').textContent = done === total ? finished
    : `${done.toLocaleString('en')} of ${total.toLocaleString('en')}${done ? `, about ${left} left` : ''}`;
}

let isWorking = false;

/** Classify the waiting files in order, once the models are there. */
async function work() {
  if (isWorking || !model) return;
  isWorking = true;
  for (let next; (next = waiting.shift());) {
    const own = round;
    try {
      const count = await ask('open', next.file);
      progress.total += own === round ? count - 1 : 0;
      if (own === round && count > 1 && count <= FEW_PLANES) {
        element('planes').textContent = `${next.name}: each of its ${count} planes is taken for a lens; ` +
          'for bands of one lens use predict.py --planes';
      }
      for (let i = 0; i < count && own === round; i++) {
        await classify(count > 1 ? `${next.name}[${i}]` : next.name, i, own);
      }
    } catch (error) {
      if (own === round) fail(`${next.name}: ${error.message}`);
    }
  }
  isWorking = false;
  refresh();
}

async function classify(name, index, own) {
  try {
    const result = await ask('classify', index);
    if (own === round) results.push({ name, ...result });
  } catch (error) {
    if (own === round) addError(`${name}: ${error.message}`);
  }
  if (own === round) progress.done += 1;
  refreshSoon();
}

function fail(text) {
  addError(text);
  progress.done += 1;
  refreshSoon();
}

function classifyFiles(files) {
  if (progress.done === progress.total) progress = { done: 0, total: 0, start: performance.now() };
  progress.total += files.length;
  waiting.push(...files);
  showProgress();
  work();
}

function clear() {
  round += 1;
  waiting.length = 0;
  results = [];
  progress = { done: 0, total: 0, start: 0 };
  element('errors').replaceChildren();
  element('failures').hidden = true;
  element('planes').textContent = '';
  element('filter').value = '';
  refresh();
}

let refreshed = 0;

function refreshSoon() {
  if (performance.now() - refreshed > 250) refresh();
}

/** Filter and sort the results, and show them. */
function refresh() {
  const wanted = element('filter').value;
  shown = results.filter(({ prediction }) => !wanted || prediction === wanted);
  if (order.column) {
    const { of } = order.column;
    const compare = (a, b) => (typeof a === 'string' ? a.localeCompare(b, 'en', { numeric: true }) : a - b);
    shown.sort((a, b) => order.sign * compare(of(a), of(b)));
  }
  sigma = model?.sigma ?? medianRms(shown);
  for (const option of element('filter').options) {
    const count = results.filter(({ prediction }) => !option.value || prediction === option.value).length;
    option.textContent = `${option.value || 'all'} (${count.toLocaleString('en')})`;
  }
  element('results').hidden = !results.length;
  element('unfamiliar').hidden = !results.some(({ prediction }) => prediction === 'unfamiliar');
  showProgress();
  showRows();
  refreshed = performance.now();
}

/** Draw the rows in sight; the first and the last row stand for those above and below. */
function showRows() {
  const { scrollTop, clientHeight } = element('scroll');
  const first = Math.max(0, Math.min(Math.floor(scrollTop / ROW_HEIGHT), shown.length) - 3);
  const last = Math.min(shown.length, first + Math.ceil(clientHeight / ROW_HEIGHT) + 6);
  const gap = (rows) => {
    const row = newElement('tr', '');
    row.style.height = `${rows * ROW_HEIGHT}px`;
    return row;
  };
  const rows = shown.slice(first, last).map((result) => {
    const row = rowOf(result, tableOrder(columns), sigma);
    row.addEventListener('click', () => enlarge(result));
    return row;
  });
  element('rows').replaceChildren(gap(first), ...rows, gap(shown.length - last));
}

function enlarge(result) {
  const lines = columns.map(({ name, of, text }) => newElement('p', `${name} ${text(of(result))}`));
  element('large').replaceChildren(...picturesOf(result, sigma), ...lines);
  element('large').showModal();
}

function sortBy(column, cell) {
  order = { column, sign: order.column === column ? -order.sign : 1 };
  for (const other of cell.parentElement.children) other.removeAttribute('aria-sort');
  cell.setAttribute('aria-sort', order.sign > 0 ? 'ascending' : 'descending');
  refresh();
}

function download() {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([csvOf(results, columns)], { type: 'text/csv' }));
  link.download = 'predictions.csv';
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

/** The table's header, its filter and the scale of the maps, as the models ask for. */
function prepareTable() {
  columns = columnsOf(model);
  element('head').append(newElement('th', 'image, map'), ...tableOrder(columns).map((column) => {
    const cell = newElement('th', '');
    const button = newElement('button', column.name);
    button.addEventListener('click', () => sortBy(column, cell));
    cell.append(button);
    return cell;
  }));
  for (const name of ['', ...model.labels, 'unfamiliar']) {
    const option = newElement('option', '');
    option.value = name;
    element('filter').append(option);
  }
  drawScale(element('bar'));
  element('unit').textContent = model.sigma ? 'residual in sigma of smooth lenses'
    : 'residual in units of the median rms of the maps shown';
}

/** The content (Uint8Array) of a model beside the page. */
async function fetchModel(name) {
  // Else the browser may go on with a file that has been replaced since.
  const response = await fetch(name, { cache: 'no-cache' });
  if (!response.ok) throw new Error(`there is no ${name} beside this page`);
  return new Uint8Array(await response.arrayBuffer());
}

/** What is said while the worker opens the models; it also says what is wrong with them. */
function opening(classifier) {
  try {
    return `Opening the models, which tell ${classNames(classifier).join(', ')} apart…`;
  } catch {
    return 'Opening the models…';
  }
}

/** The name of an example, without the folder of its class but with one above it. */
function shortName(path) {
  const parts = path.split('/');
  return [...parts.slice(0, -2), parts.at(-1)].join('/');
}

async function offerExamples() {
  const response = await fetch('examples.json', { cache: 'no-cache' });
  if (!response.ok) return; // page.py writes it: this page is served from its sources
  const files = (await response.json()).map((name) => ({ name, file: `examples/${name}` }));
  const offers = [['all', files], ...files.map((file) => [shortName(file.name), [file]])];
  element('examples').append(...offers.map(([name, chosen]) => {
    const button = newElement('button', name);
    button.addEventListener('click', () => classifyFiles(chosen));
    return button;
  }));
  element('examples').hidden = !files.length;
}

function takeDropped({ files, others }) {
  if (others.length) addError(`${counted(others.length, 'other file')} not read: ${others.slice(0, 5).join(', ')}`);
  classifyFiles(files);
}

function listen() {
  const pick = element('pick');
  pick.addEventListener('change', () => {
    classifyFiles([...pick.files].map((file) => ({ name: file.name, file })));
    pick.value = ''; // so that the same file can be picked again
  });
  const drop = element('drop');
  addEventListener('dragover', (event) => {
    event.preventDefault();
    drop.classList.add('over');
  });
  addEventListener('dragleave', () => drop.classList.remove('over'));
  let drops = Promise.resolve(); // one after the other, however large a folder is
  addEventListener('drop', (event) => {
    event.preventDefault();
    drop.classList.remove('over');
    const found = droppedFiles(event.dataTransfer.items);
    drops = drops.then(() => found).then(takeDropped).catch((error) => addError(`not readable: ${error.message}`));
  });
  element('filter').addEventListener('change', refresh);
  element('clear').addEventListener('click', clear);
  element('download').addEventListener('click', download);
  element('scroll').addEventListener('scroll', () => requestAnimationFrame(showRows));
  element('large').addEventListener('click', () => element('large').close());
}

listen();
element('tool').hidden = false;
element('status').textContent = 'Loading the models…';
const asked = new URLSearchParams(location.search).get('files');
if (asked) classifyFiles(asked.split(',').map((name) => ({ name, file: name })));
try {
  await offerExamples();
  const contents = await Promise.all(['classifier.onnx', 'reconstruction.onnx'].map(fetchModel));
  element('status').textContent = opening(contents[0]);
  model = await ask('models', contents);
  element('warning').textContent = model.warning;
  element('doubt').textContent = model.doubt;
  element('status').textContent = `Ready. ${model.identity}`;
  prepareTable();
  progress.start = performance.now();
  work();
} catch (error) {
  element('status').textContent = error.message;
  element('status').className = 'error';
}
