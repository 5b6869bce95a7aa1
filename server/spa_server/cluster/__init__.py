"""Jobs on the nodes of a Ray cluster (extra `ray`).

    cluster.py   in the server: hands jobs to the agent, and waits for their end
    agent.py     a process of its own, the only one that talks to Ray: Ray ends its client when a cluster is lost
    node.py      on a node: puts files in place, starts the same worker as a server without a cluster, and watches it

Files travel through Ray: nodes need neither the store nor the database, and know no secrets.
"""
