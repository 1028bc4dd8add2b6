"""Agents that learn to plan the compression of a network, and the searches they are compared with."""
