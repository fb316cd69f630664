// What a visitor drops: files, and the .npy and FITS files of folders.

const isHidden = (name) => name.startsWith('.') || name === '__MACOSX';

/** {files: [{name, file}] in the order of their names, others: names of other files in folders}. */
export async function droppedFiles(items) {
  const found = { files: [], others: [] };
  // All entries first: the list is emptied as soon as the handler of the drop waits.
  const entries = [...items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  for (const entry of entries) await collect(entry, found, true);
  return found;
}

async function collect(entry, found, isDropped) {
  if (isHidden(entry.name) && !isDropped) return;
  const name = entry.fullPath.replace(/^\//, '');
  if (entry.isDirectory) {
    for (const child of await childrenOf(entry)) await collect(child, found, false);
  } else if (isDropped || /\.(npy|fits?|fts)$/i.test(name)) {
    found.files.push({ name, file: await new Promise((...done) => entry.file(...done)) });
  } else {
    found.others.push(name);
  }
}

async function childrenOf(folder) {
  const reader = folder.createReader();
  const children = [];
  for (;;) { // a reader gives at most 100 at once
    const more = await new Promise((...done) => reader.readEntries(...done));
    if (!more.length) break;
    children.push(...more);
  }
  return children.sort((a, b) => a.name.localeCompare(b.name, 'en', { numeric: true }));
}
