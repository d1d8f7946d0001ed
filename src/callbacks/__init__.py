"""Lightning callbacks: throughput, progress, agreement between ranks."""
