import os

import pytest

# a machine that is short of memory for other reasons is not what is tested
os.environ.update(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_memory_monitor_refresh_ms": "0",
    }
)

collect_ignore_glob = []
try:
    import ray
except ImportError:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session")
def cluster():
    """A cluster of two nodes on this machine, of two cores and of one, that this process is in."""
    import faults
    from ray.cluster_utils import Cluster

    size = 100 * 2**20
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": size, "include_dashboard": False},
    )
    made.second = made.add_node(num_cpus=1, object_store_memory=size)
    made.wait_for_nodes()
    ray.init(made.address, log_to_driver=False, logging_level="ERROR")
    ray.cloudpickle.register_pickle_by_value(faults)
    yield made
    ray.shutdown()
    made.shutdown()
