"""What `fastvlm bench` is made of: workloads, measurements, physical limits, reports."""
