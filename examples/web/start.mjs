// Start the page with its newest files: a browser may take those of an earlier visit for fresh. What is
// fetched here is what the imports then find.

const files = ['app.mjs', 'table.mjs', 'files.mjs', 'worker.mjs', '../formats.mjs', '../fits.mjs',
  '../node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs'];
await Promise.all(files.map((name) => fetch(new URL(name, import.meta.url), { cache: 'no-cache' })));
await import('./app.mjs');
