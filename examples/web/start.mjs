// Start the page with its newest files: a browser may take those of an earlier visit for fresh. What is
// fetched here is what the import then finds.

const files = ['app.mjs', '../formats.mjs'];
await Promise.all(files.map((name) => fetch(new URL(name, import.meta.url), { cache: 'no-cache' })));
await import('./app.mjs');
