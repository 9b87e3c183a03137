"""Training in Gram space against training the weights: seconds, and how far the outputs differ.

A two-layer ReLU network on XOR clusters, 40 steps of full-batch gradient descent, the same record (accuracies, odd
fraction, alignments at every step) by both. Data and initial weights are made beforehand; the inner products of Gram
space are part of its time. CPU time of one thread. Run: `python benchmarks/grokking_gram.py`.
"""

import argparse
import time

import torch

from corollary.dynamics.grokking import GrokRecord
from corollary.dynamics.xor_clusters import TwoLayerReLU, XORClusters, descent, grok_xor, xor_clusters


def timed_steps(data: XORClusters, net: TwoLayerReLU, steps: int, gram: bool) -> float:
    """CPU seconds of the steps alone, with nothing watched."""
    start = time.process_time()
    for _ in descent(net, data.x, data.y, data.x[:1], learning_rate=0.01, steps=steps, gram=gram):
        pass
    return time.process_time() - start


def timed_record(data: XORClusters, net: TwoLayerReLU, steps: int, gram: bool) -> tuple[float, GrokRecord]:
    """CPU seconds of the whole record, without the drawing of its test points."""
    start = time.process_time()
    data.test(1000)
    drawing = time.process_time() - start
    start = time.process_time()
    record = grok_xor(data, net, steps=steps, gram=gram)
    return time.process_time() - start - drawing, record


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {arguments.samples} samples, {arguments.width} neurons, {arguments.steps} steps")
    for dimension in (5000, 20_000, 40_000):
        data, net = xor_clusters(arguments.samples, dimension), TwoLayerReLU(dimension, arguments.width)
        steps, records = {}, {}
        found: dict[bool, GrokRecord] = {}
        for gram in (True, False):
            steps[gram] = min(timed_steps(data, net, arguments.steps, gram) for _ in range(arguments.repeats))
            runs = [timed_record(data, net, arguments.steps, gram) for _ in range(arguments.repeats)]
            records[gram], found[gram] = min(seconds for seconds, _ in runs), runs[0][1]
        gap = (found[True].test_outputs - found[False].test_outputs).abs().max() / found[False].test_outputs.abs().max()
        same = (found[True].record["test_accuracy"] == found[False].record["test_accuracy"]).mean()
        print(
            f"p = {dimension:6,}: steps {steps[False]:.2f} s direct, {steps[True]:.3f} s Gram, ratio "
            f"{steps[False] / steps[True]:.1f}; with the record {records[False]:.2f} s and {records[True]:.3f} s, "
            f"ratio {records[False] / records[True]:.1f}; outputs differ by {float(gap):.1e}, test accuracy equal at "
            f"{same:.0%} of the steps"
        )
