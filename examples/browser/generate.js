// An exported decoder in the browser: greedy text, token by token, with a key-value cache.

import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-web";

ort.env.wasm.wasmPaths = new URL("node_modules/onnxruntime-web/dist/", import.meta.url).href;

const read = async (url) => {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url}: ${answer.status} ${answer.statusText}`);
  return answer.json();
};

const int64 = (numbers) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), [1, numbers.length]);

/** Open the folder that `graphprune run` calls `onnx/`. */
export async function open(folder) {
  const [tokenizer, settings, config] = await Promise.all(
    ["tokenizer.json", "tokenizer_config.json", "genai_config.json"].map((file) => read(`${folder}/${file}`)),
  );
  const session = await ort.InferenceSession.create(`${folder}/model.onnx`, {
    executionProviders: ["wasm"],
    logSeverityLevel: 3,
    externalData: [{ path: "model.onnx.data", data: `${folder}/model.onnx.data` }],
  });
  const ends = new Set([config.model.eos_token_id].flat());
  return { session, ends, tokenizer: new Tokenizer(tokenizer, settings) };
}

/** Yield the text written so far, and what the last token took in milliseconds, after each token. */
export async function* generate({ session, ends, tokenizer }, prompt, maxTokens) {
  let cache = {};
  for (const { name, shape } of session.inputMetadata) {
    if (name.startsWith("past_key_values."))
      cache[name] = new ort.Tensor("float32", [], [1, shape[1], 0, shape[3]]);
  }
  const written = [];
  let ids = tokenizer.encode(prompt).ids;
  let length = 0;
  while (written.length < maxTokens) {
    const start = performance.now();
    const positions = ids.map((_, index) => length + index);
    length += ids.length;
    const feeds = { input_ids: int64(ids), attention_mask: int64(Array(length).fill(1)), position_ids: int64(positions) };
    const { logits, ...present } = await session.run({ ...feeds, ...cache });
    cache = Object.fromEntries(
      Object.entries(present).map(([name, keys]) => [name.replace("present", "past_key_values"), keys]),
    );
    const last = logits.data.subarray(-logits.dims[2]);
    const token = last.reduce((best, value, index) => (value > last[best] ? index : best), 0);
    if (ends.has(token)) return;
    written.push(token);
    ids = [token];
    yield { text: tokenizer.decode(written), milliseconds: performance.now() - start };
  }
}
