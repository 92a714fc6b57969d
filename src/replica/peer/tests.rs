mod codec;
mod loopback;
mod refusals;
mod samples;
