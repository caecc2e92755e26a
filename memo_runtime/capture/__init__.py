"""One block -> its operators as a graph, cut into segments at the operators that mix tokens."""
