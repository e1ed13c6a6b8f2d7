"""A Ray cluster of two nodes in a process of its own, because Ray ends every process that loses its cluster.

Prints the cluster's address. A line on stdin removes the second node, and "removed" is printed.
"""

from __future__ import annotations

import sys


def main(folder: str) -> None:
    from ray.cluster_utils import Cluster

    first = {"num_cpus": 1, "include_dashboard": False, "temp_dir": folder}
    cluster = Cluster(initialize_head=True, head_node_args=first)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        cluster.remove_node(second, allow_graceful=False)
        print("removed", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
