/* What runs a program of system calls that was planned in Python (shim.runtime.program), x86_64. Two ways in:
 * _start, for an executable: fd 3 is the program, mapped at 0x10000000.
 * launch(program), 16 bytes on, a function: makes the system call in the head, a clone; returns its result in the parent, and runs the
 * program in the child, which has no stack, so nothing is pushed.
 * The head is eight words: address of the first operation, address for a report, fd for a report or -1, number and three arguments of
 * the clone, and a spare one. An operation is eight words: number, six arguments, and a word with kind (byte 0), an errno that is no error
 * (byte 1) and the step for reports (bytes 2, 3).
 * Kinds: 0 plain, 1 any error is ignored, 2 that one errno is ignored, 4 clone: the parent goes on at the address in the sixth argument,
 * 5 a result of 0 is the end: exit_group(137), 6 execve of each candidate in the command block at argument 0, 7 *(*argument 0) = argument 1,
 * 8 wait, without a system call, until *argument 0 is not 0.
 * An error is reported as two 32-bit words, step and errno, before exit_group(127).
 * rbp: head, rbx: operation, r12: errno of the candidates so far, r13: kind; none of them is changed by system calls. */
.intel_syntax noprefix
.globl _start, launch
_start:
  jmp map
.balign 16
launch:
  mov r9, rdi
  mov rax, [r9+24]
  mov rdi, [r9+32]
  mov rsi, [r9+40]
  mov rdx, [r9+48]
  xor r10d, r10d
  xor r8d, r8d
  syscall
  test rax, rax
  jz child
  ret
child:
  mov rbp, r9
  jmp run
map:
  mov eax, 9             # mmap(0x10000000, 16 MiB, read and write, private and fixed, 3, 0)
  mov edi, 0x10000000
  mov esi, 0x1000000
  mov edx, 3
  mov r10d, 0x12
  mov r8d, 3
  xor r9d, r9d
  syscall
  cmp rax, rdi
  jne die
  mov rbp, rax
run:
  mov rbx, [rbp]
  xor r12d, r12d
next:
  movzx r13d, byte ptr [rbx+56]
  cmp r13b, 6
  je candidates
  cmp r13b, 7
  je store
  cmp r13b, 8
  je spin
  mov rax, [rbx]
  mov rdi, [rbx+8]
  mov rsi, [rbx+16]
  mov rdx, [rbx+24]
  mov r10, [rbx+32]
  mov r8, [rbx+40]
  mov r9, [rbx+48]
  syscall
  test rax, rax
  js error
  cmp r13b, 4
  jb advance
  test rax, rax
  je zero
  cmp r13b, 4
  jne advance
  mov rbx, [rbx+48]
  jmp next
zero:
  cmp r13b, 5
  jne advance
  mov edi, 137
  jmp exit
spin:
  mov rax, [rbx+8]
wait:
  pause
  cmp qword ptr [rax], 0
  je wait
  jmp advance
store:
  mov rax, [rbx+8]
  mov rax, [rax]
  mov rcx, [rbx+16]
  mov [rax], rcx
advance:
  add rbx, 64
  jmp next
error:
  neg eax
  cmp r13b, 1
  je advance
  cmp r13b, 2
  jne fail
  cmp al, [rbx+57]
  je advance
fail:
  movzx ecx, word ptr [rbx+58]
  mov rsi, [rbp+8]
  mov [rsi], ecx
  mov [rsi+4], eax
  mov rdi, [rbp+16]
  test rdi, rdi
  js die
  mov eax, 1             # write(fd, report, 8)
  mov edx, 8
  syscall
die:
  mov edi, 127
exit:
  mov eax, 231           # exit_group
  syscall
  hlt
candidates:
  mov r14, [rbx+8]
  lea r15, [r14+24]
each:
  mov rdi, [r15]
  test rdi, rdi
  jz none
  add r15, 8
  mov rsi, [r14]
  mov rdx, [r14+8]
  mov eax, 59            # execve
  syscall
  neg eax
  cmp eax, 13            # EACCES: the best reason so far
  je keep
  cmp eax, 2             # ENOENT
  je first
  cmp eax, 20            # ENOTDIR
  je first
  mov r12d, eax
  jmp none
first:
  test r12d, r12d
  jnz each
keep:
  mov r12d, eax
  jmp each
none:
  mov eax, r12d
  jmp fail
