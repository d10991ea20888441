//! What a request stands for, on machines in memory.
