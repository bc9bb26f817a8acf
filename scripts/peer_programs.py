"""Programs of other systems that `bench_train.py` times, each run in an environment of its own: what they print last
is ratings a second."""

LIBMF = """
import sys, time, numpy as np, pyarrow.parquet as pq
import libmf.mf as mf
table = pq.read_table(sys.argv[1])
rows = np.ascontiguousarray(np.stack([table[c].to_numpy().astype("f4") for c in ("user", "item", "rating")], 1))
seconds = []
for epochs in (1, 20):
    engine = mf.MF(k=int(sys.argv[3]), nr_iters=epochs, nr_threads=int(sys.argv[2]), quiet=True, lambda_p1=0,
                   lambda_q1=0, lambda_p2=0.05, lambda_q2=0.05, eta=0.1, nr_bins=26)
    began = time.perf_counter()
    engine.fit(rows)
    seconds.append(time.perf_counter() - began)
print(len(rows) * 19 / (seconds[1] - seconds[0]))
"""
FBGEMM = """
import sys, time, statistics, pyarrow.parquet as pq, torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice, OptimType, SplitTableBatchedEmbeddingBagsCodegen)
size, threads, dim, users, items = map(int, sys.argv[2:7])
torch.set_num_threads(threads)
table = pq.read_table(sys.argv[1]).slice(0, 30 * size)
user, item, rating = (torch.from_numpy(table[c].to_numpy().copy()) for c in ("user", "item", "rating"))
tables = [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU) for rows in (users, items)]
for kind in (OptimType.EXACT_ROWWISE_ADAGRAD,):
    bags = SplitTableBatchedEmbeddingBagsCodegen(
        tables, optimizer=kind, learning_rate=0.01, eps=1e-8, pooling_mode=PoolingMode.SUM)
    bags.init_embedding_weights_uniform(0, 0.05)
    seconds = []
    for k in range(len(rating) // size):
        part = slice(k * size, (k + 1) * size)
        began = time.perf_counter()
        both = torch.cat([user[part].long(), item[part].long()])
        found = bags(both, torch.arange(2 * size + 1))
        score = torch.sigmoid((found[:, :dim] * found[:, dim:]).sum(1)) * 5 + 0.5
        ((score - rating[part]) ** 2).mean().backward()
        seconds.append(time.perf_counter() - began)
    print(size / statistics.median(seconds[3:]))
"""
