build:
	clang -O2 -g -mcpu=v3 -target bpf -Wall -Wextra -Wno-unused-parameter -Wno-sign-compare -Wpadded -Werror -D__TARGET_ARCH_x86 -I/usr/include/x86_64-linux-gnu -c bpf/capture.bpf.c -o agent/kernel/capture.x86_64.bpf.o
