// The ids that llama.cpp gives the texts of an .inp file (docs/tokenizers.md), one line per text:
//
//     npm install node-llama-cpp && node llama_cpp_tokens.mjs VOCABULARY.gguf TEXTS.inp > VOCABULARY.gguf.out
//
// Special tokens in the texts are read as plain text, and no BOS is added.
import fs from "fs";
import {getLlama} from "node-llama-cpp";

const [, , modelPath, textsFile] = process.argv;
const llama = await getLlama({gpu: false, logLevel: "disabled"});
const model = await llama.loadModel({modelPath, vocabOnly: true});
const separator = "\n__ggml_vocab_test__\n";
const texts = fs.readFileSync(textsFile, "utf8").split(separator);
if (texts.at(-1) === "") texts.pop();
for (const text of texts) console.log(Array.from(model.tokenize(text, false)).join(" "));
process.exit(0);
