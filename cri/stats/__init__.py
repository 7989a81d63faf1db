"""What pods and containers use: the stats RPCs, which the kubelet sends every few seconds, and the metrics that it shows as cAdvisor's."""
