// The results: pictures, the rows of the table that are in sight, and the CSV.

import { UNFAMILIAR } from '../formats.mjs';

const LINEAR_SIGMAS = 3; // as in lib/plots.py
const MOST_SIGMAS = 100;
const RED_BLUE = '053061 2166ac 4393c3 92c5de d1e5f0 f7f7f7 fddbc7 f4a582 d6604d b2182b 67001f'
  .split(' ').map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const TICKS = [-100, -20, -5, 0, 5, 20, 100];

/** Place in the colour scale, -1 to 1, of a residual in sigma. */
function stretched(sigmas) {
  const place = Math.asinh(sigmas / LINEAR_SIGMAS) / Math.asinh(MOST_SIGMAS / LINEAR_SIGMAS);
  return Math.max(-1, Math.min(1, place));
}

export function mapColour(sigmas) {
  const place = ((stretched(sigmas) + 1) / 2) * (RED_BLUE.length - 1);
  const from = Math.min(Math.floor(place), RED_BLUE.length - 2);
  return RED_BLUE[from].map((low, i) => low + (place - from) * (RED_BLUE[from + 1][i] - low));
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

/** A canvas of numbers in rows of `width`, the first row at the bottom as astronomers have it. */
function picture(numbers, width, colour) {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = numbers.length / width;
  const pixels = new ImageData(width, canvas.height);
  numbers.forEach((number, i) => {
    const row = canvas.height - 1 - Math.floor(i / width);
    pixels.data.set([...colour(number), 255], 4 * (row * width + (i % width)));
  });
  canvas.getContext('2d').putImageData(pixels, 0, 0);
  return canvas;
}

/** Canvases of a result's image and of its map, in units of sigma. */
export function picturesOf({ image, map }, sigma) {
  const side = Math.sqrt(image.length);
  return [picture(image, side, imageColours(image)), picture(map, side, (x) => mapColour(x / sigma))];
}

/** Fill the colour bar of the maps. */
export function drawScale(bar) {
  const places = Array.from({ length: 256 }, (_, i) => (2 * i) / 255 - 1);
  const sigmas = (place) => LINEAR_SIGMAS * Math.sinh(place * Math.asinh(MOST_SIGMAS / LINEAR_SIGMAS));
  bar.replaceChildren(picture(places, 256, (place) => mapColour(sigmas(place))), ...TICKS.map((tick) => {
    const label = newElement('span', tick > 0 ? `+${tick}` : `${tick}`.replace('-', '−'));
    label.style.left = `${50 * (1 + stretched(tick))}%`;
    return label;
  }));
}

/** The median rms of the results' maps. */
export function medianRms(results) {
  const sorted = results.map(({ rms }) => rms).sort((a, b) => a - b);
  return sorted[Math.floor(sorted.length / 2)] || 1;
}

export function newElement(kind, text) {
  const element = document.createElement(kind);
  element.textContent = text;
  return element;
}

/** The columns of the table in the order of predict.py's: {name, of: a result's value, text}. */
export function columnsOf({ labels, hasFamiliarity }) {
  const share = (x) => x.toFixed(6);
  return [
    { name: 'file', of: ({ name }) => name, text: String },
    ...labels.map((name, i) => ({ name, of: ({ probabilities }) => probabilities[i], text: share })),
    { name: 'prediction', of: ({ prediction }) => prediction, text: String },
    ...(hasFamiliarity ? [{ name: 'familiarity', of: ({ familiarity }) => familiarity, text: share }] : []),
    { name: 'residual', of: ({ residual }) => residual, text: sixDigits },
  ];
}

/** The columns as the table shows them: the prediction is beside the file, so that a phone shows it. */
export function tableOrder([file, ...others]) {
  const [prediction] = others.splice(others.findIndex(({ name }) => name === 'prediction'), 1);
  return [file, prediction, ...others];
}

/** The row of a result, with its pictures. */
export function rowOf(result, columns, sigma) {
  const row = newElement('tr', '');
  row.className = result.prediction === UNFAMILIAR ? UNFAMILIAR : '';
  const pictures = newElement('td', '');
  pictures.append(...picturesOf(result, sigma));
  row.append(pictures, ...columns.map(({ name, of, text }) => {
    const cell = newElement('td', text(of(result)));
    cell.className = name === 'file' ? 'file' : '';
    cell.title = name === 'file' ? result.name : '';
    return cell;
  }));
  return row;
}

/** A number as Python's format .6g writes it. */
function sixDigits(number) {
  const [digits, exponent] = number.toExponential(5).split('e');
  if (exponent >= -4 && exponent < 6) return String(Number(number.toPrecision(6)));
  return `${Number(digits)}e${exponent[0]}${exponent.slice(1).padStart(2, '0')}`;
}

/** The CSV of results, escaped as lib/files.py does it. */
export function csvOf(results, columns) {
  const rows = [columns.map(({ name }) => name),
    ...results.map((result) => columns.map(({ of, text }) => text(of(result))))];
  return rows.map((row) => `${row.map(csvCell).join(',')}\n`).join('');
}

function csvCell(text) {
  // A spreadsheet would compute it: with ./ in front a path still names its file.
  const isFormula = /^[=+\-@＝＋－＠\t\r\n]/.test(text) && Number.isNaN(Number(text.trim() || NaN));
  const cell = isFormula ? `./${text}` : text;
  return /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
}
