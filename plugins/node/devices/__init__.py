"""The devices of a node: AMD's, NVIDIA's or simulated ones behind one interface, and the prober that reads them."""
