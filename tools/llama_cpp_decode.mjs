// What llama.cpp does with the same GGUF and the same prompts as `dflash-jax bench decode`: tokens per second after prefill.
//
//   npm install --ignore-scripts --omit=dev node-llama-cpp@3.22.1   (in a folder of its own)
//   node llama_cpp_decode.mjs FOLDER_WITH_NODE_MODULES MODEL.gguf RENDERED.jsonl [THREADS] [TOKENS]
//
// RENDERED.jsonl has {"text": "..."} lines: prompts with the chat template applied (tools/render_prompts.py writes them).
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, modelPath, promptsPath, threads = "2", most = "128"] = process.argv.slice(2);
const entry = `${folder}/node_modules/node-llama-cpp/dist/index.js`;
const { getLlama } = await import(pathToFileURL(entry).href);
const llama = await getLlama({ build: "never", gpu: false, logLevel: "error" });
const model = await llama.loadModel({ modelPath });
const context = await model.createContext({ contextSize: 8192, threads: Number(threads) });
const sequence = context.getSequence();

let tokens = 0;
let seconds = 0;
for (const line of readFileSync(promptsPath, "utf8").split("\n").filter(Boolean)) {
  await sequence.clearHistory();
  const prompt = model.tokenize(JSON.parse(line).text, true);
  let first;
  let last;
  let count = 0;
  const started = performance.now();
  for await (const token of sequence.evaluate(prompt, { temperature: 0, yieldEogToken: true })) {
    last = performance.now();
    first ??= last;
    count += 1;
    if (model.isEogToken(token) || count >= Number(most)) break;
  }
  const rate = (1000 * (count - 1)) / (last - first);
  console.log(JSON.stringify({ prompt_tokens: prompt.length, new_tokens: count, ttft_s: (first - started) / 1000, tok_s: rate }));
  tokens += count - 1;
  seconds += (last - first) / 1000;
}
console.log(JSON.stringify({ total_tok_s: tokens / seconds }));
await llama.dispose();
