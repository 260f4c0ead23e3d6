"""The WEMoE runtime: a router, a Linear layer with composed weights, the wrapper, and loading."""
