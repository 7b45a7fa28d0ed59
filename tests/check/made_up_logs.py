"""Small logs made up from vLLM's formats; no server printed them. Figures that a rule predicts are in the tests."""

SERVER_0_15 = """\
(APIServer pid=11) INFO 11-22 10:00:00 [api_server.py:1351] vLLM API server version 0.15.1
(APIServer pid=11) INFO 11-22 10:00:00 [utils.py:233] non-default args: {'model_tag': 'Qwen/Qwen2.5-7B-Instruct', \
'model': 'Qwen/Qwen2.5-7B-Instruct', 'max_num_seqs': 128, 'max_num_batched_tokens': 1024, \
'compilation_config': CompilationConfig(level=3, cudagraph_capture_sizes=[1, 2]), 'gpu_memory_utilization': 0.9}
(APIServer pid=11) INFO 11-22 10:00:09 [model.py:1561] Using max model len 32768
(APIServer pid=11) INFO 11-22 10:00:09 [scheduler.py:226] Chunked prefill is enabled with max_num_batched_tokens=1024.
(APIServer pid=11) INFO 11-22 10:00:09 [vllm.py:624] Asynchronous scheduling is enabled.
(EngineCore_DP0 pid=20) INFO 11-22 10:00:19 [core.py:96] Initializing a V1 LLM engine (v0.15.1) with config: \
model='Qwen/Qwen2.5-7B-Instruct', speculative_config=None, dtype=torch.bfloat16, max_seq_len=32768, \
tensor_parallel_size=1, pipeline_parallel_size=1, quantization=None, enforce_eager=False, kv_cache_dtype=auto, \
enable_prefix_caching=True, enable_chunked_prefill=True
(EngineCore_DP0 pid=20) \x1b[32mINFO\x1b[0m 11-22 10:00:40 [gpu_model_runner.py:3808] Model loading took 14.19 GiB \
memory and 3.210000 seconds
(EngineCore_DP0 pid=20) INFO 11-22 10:01:00 [gpu_worker.py:356] Available KV cache memory: 55.86 GiB
(EngineCore_DP0 pid=20) INFO 11-22 10:01:00 [kv_cache_utils.py:1307] GPU KV cache size: 1,045,888 tokens
(EngineCore_DP0 pid=20) INFO 11-22 10:01:00 [kv_cache_utils.py:1312] Maximum concurrency for 32,768 tokens per \
request: 31.92x
(EngineCore_DP0 pid=20) INFO 11-22 10:01:09 [gpu_model_runner.py:4700] Graph capturing finished in 6 secs, took 0.55 GiB
"""

SERVER_0_8 = """\
INFO 03-20 17:28:13 [api_server.py:977] vLLM API server version 0.8.1
INFO 03-20 17:28:13 [api_server.py:978] args: Namespace(subparser='serve', host=None, model_tag='yi-34b', \
model='yi-34b', max_model_len=4096, tensor_parallel_size=2, block_size=None, gpu_memory_utilization=0.9, \
max_num_batched_tokens=2048, max_num_seqs=128, kv_cache_dtype='auto', enable_prefix_caching=None)
(VllmWorker rank=0 pid=31) INFO 03-20 17:29:00 [gpu_model_runner.py:1164] Model loading took 32.0369 GB and 9.1 seconds
(VllmWorker rank=1 pid=32) INFO 03-20 17:29:01 [gpu_model_runner.py:1164] Model loading took 32.0370 GB and 9.2 seconds
INFO 03-20 17:29:30 [kv_cache_utils.py:537] GPU KV cache size: 332,704 tokens
INFO 03-20 17:29:30 [kv_cache_utils.py:540] Maximum concurrency for 4,096 tokens per request: 81.23x
INFO 03-20 17:29:30 [kv_cache_utils.py:537] GPU KV cache size: 332,688 tokens
INFO 03-20 17:29:30 [kv_cache_utils.py:540] Maximum concurrency for 4,096 tokens per request: 81.22x
"""

SERVER_0_22 = """\
(APIServer pid=1) INFO 08-14 14:07:00 [utils.py:233] non-default args: {'model': 'meta-llama/Llama-3.1-8B', \
'max_num_seqs': 64}
(EngineCore pid=2) INFO 08-14 14:07:05 [core.py:101] Initializing a V1 LLM engine (v0.22.0) with config: \
model='meta-llama/Llama-3.1-8B', dtype=torch.bfloat16, max_seq_len=131072, tensor_parallel_size=1, kv_cache_dtype=fp8
(EngineCore pid=2) INFO 08-14 14:07:06 [vllm.py:224] Chunked prefill is enabled with max_num_batched_tokens=8192.
(EngineCore pid=2) INFO 08-14 14:07:20 [gpu_model_runner.py:6806] Estimated CUDA graph memory: 0.36 GiB total
(EngineCore pid=2) INFO 08-14 14:07:22 [gpu_worker.py:578] CUDA graph memory profiling is enabled (default)
(EngineCore pid=2) INFO 08-14 14:07:22 [gpu_worker.py:563] Available KV cache memory: 55.85 GiB
(EngineCore pid=2) INFO 08-14 14:07:23 [kv_cache_utils.py:868] GPU KV cache size: 915,040 tokens
(EngineCore pid=2) INFO 08-14 14:07:39 [gpu_worker.py:857] Free memory on device (78.66/79.19 GiB) on startup. Desired \
GPU memory utilization is (0.92, 72.86 GiB). Actual usage is 14.99 GiB for weight, 1.40 GiB for peak activation, 0.20 \
GiB for non-torch memory, and 0.36 GiB for CUDAGraph memory.
"""
